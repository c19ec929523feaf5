"""SimA on a GPU: sums over the tokens, one small matrix per head, and that matrix times the queries.

q, k, v are read as they lie; the output is written with the tokens outside the heads, as the projection
behind it reads it. The backward pass keeps the matrix and the sums.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import BLOCK, inverse_power, kept, power, tokens_of


@triton.jit
def _absolute_sums(
    q,
    mask,
    total,
    tokens,
    per_part,
    heads,
    dim,
    prescale,
    q_b,
    q_h,
    q_n,
    q_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One part of sum_n |prescale q_n|."""
    part, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d = tl.arange(0, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
        x = tokens_of(q, batch, head, n, d, inside, dim, q_b, q_h, q_n, q_d)
        acc += tl.abs(x.to(tl.float32)) * prescale
    tl.store(total + (program * tl.num_programs(0) + part) * D + d, tl.sum(acc, 0))


@triton.jit
def _parts(product, scale, program, parts, D: tl.constexpr, E: tl.constexpr):
    """The sum of the parts of `gather` at the smallest of their scales, and that scale."""
    d, e = tl.arange(0, D), tl.arange(0, E)
    by = tl.full([D], 2.0**60, tl.float32)
    for part in range(parts):
        by = tl.minimum(by, tl.load(scale + (program * parts + part) * D + d))
    acc = tl.zeros([D, E], tl.float32)
    for part in range(parts):
        at = program * parts + part
        one = tl.load(product + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
        acc += one * (by / tl.load(scale + at * D + d))[:, None]
    return acc, by


@triton.jit
def _scaled(values, matrix, scale, factor, program, A: tl.constexpr, B: tl.constexpr):
    """Stores values (A, B) as a matrix for `apply`, and a scale for each of its B output channels."""
    a, b = tl.arange(0, A), tl.arange(0, B)
    largest = tl.max(tl.abs(values), 0)
    at = matrix + program.to(tl.int64) * A * B + a[:, None] * B + b[None, :]
    tl.store(at, (values * inverse_power(largest)[None, :]).to(matrix.dtype.element_ty))
    tl.store(scale + program * B + b, power(largest) * factor)


@triton.jit
def _forward_matrix(
    product,
    scale,
    total,
    q_parts_total,
    kv,
    k_total,
    k_scale,
    q_total,
    matrix,
    out_scale,
    parts,
    q_parts,
    eps,
    prescale,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """k^^T v, and the matrix that the queries meet: k^^T v / sum |q|."""
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc, by = _parts(product, scale, program, parts, D, E)
    k_sum = tl.zeros([D], tl.float32)
    for part in range(parts):
        at = (program * parts + part) * D + d
        k_sum += tl.load(total + at) * (by / tl.load(scale + at))
    q_sum = tl.zeros([D], tl.float32)
    for part in range(q_parts):
        q_sum += tl.load(q_parts_total + (program * q_parts + part) * D + d)
    acc /= tl.maximum(k_sum, eps * by)[:, None]
    tl.store(kv + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :], acc)
    tl.store(k_total + program * D + d, k_sum)
    tl.store(k_scale + program * D + d, by)
    tl.store(q_total + program * D + d, q_sum)
    _scaled(acc / tl.maximum(q_sum, eps * prescale)[:, None], matrix, out_scale, 1.0, program, D, E)


@triton.jit
def _backward_matrices(
    product,
    scale,
    kv,
    k_total,
    k_scale,
    q_total,
    to_q,
    to_q_scale,
    q_shift,
    to_k,
    to_k_scale,
    k_shift,
    to_v,
    to_v_scale,
    parts,
    eps,
    prescale,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """From q^T grad: the matrices that make the gradients of q, k, v of grad, v, k, and the shifts by signs.

    With M = k^^T v and dM = q^^T grad, c_d = sum_e M_de dM_de:
    dq = (grad M^T - sign(q) c) / Sq,  dk = (v dM^T - sign(k) c) / Sk,  dv = (k / Sk) dM.
    Where a sum is below eps it is no function of the tokens, and c is dropped.
    """
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc, by = _parts(product, scale, program, parts, D, E)
    m = tl.load(kv + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
    k_sum = tl.load(k_total + program * D + d)
    k_by = tl.load(k_scale + program * D + d)
    q_sum = tl.load(q_total + program * D + d)
    k_free, q_free = k_sum > eps * k_by, q_sum > eps * prescale
    k_sum, q_sum = tl.maximum(k_sum, eps * k_by) / k_by, tl.maximum(q_sum, eps * prescale) / prescale
    dm = acc / q_sum[:, None] / by[:, None]
    c = tl.sum(m * dm, 1)
    _scaled(tl.trans(m / q_sum[:, None]), to_q, to_q_scale, 1 / prescale, program, E, D)
    _scaled(tl.trans(dm / k_sum[:, None]), to_k, to_k_scale, 1 / prescale, program, E, D)
    _scaled(dm / k_sum[:, None], to_v, to_v_scale, 1 / prescale, program, D, E)
    tl.store(q_shift + program * D + d, tl.where(q_free, c / q_sum, 0.0))
    tl.store(k_shift + program * D + d, tl.where(k_free, c / k_sum, 0.0))


def sima(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, query_mask: Tensor | None, eps: float
) -> Tensor:
    return _sima(q, k, v, mask, query_mask, eps)[0]


@torch.library.custom_op("sansmax::sima", mutates_args=())
def _sima(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, query_mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; k^^T v (B H, D', E'), D' and E' padded; (3, B H, D'): sums of |k| times a scale, that
    scale, sums of |q|.
    """
    heads, dim = q.shape[1], q.shape[3]
    scale = shared.prescale(q.dtype)
    product, by, k_parts = shared.gathered(k, v, mask, summed=True)
    programs, _, wide, wide_value = product.shape
    count, per_part = shared.parts(q.shape[2], programs, q.device)
    q_parts = torch.empty(programs, count, wide, dtype=torch.float32, device=q.device)
    _absolute_sums[count, programs](
        q,
        shared.pointer(query_mask, q),
        q_parts,
        q.shape[2],
        per_part,
        heads,
        dim,
        scale,
        *q.stride(),
        *shared.mask_strides(query_mask),
        D=wide,
        BLOCK=BLOCK,
        MASKED=query_mask is not None,
    )
    out, kv, rows = _empty(q, v)
    matrix, matrix_scale = shared.matrix(q, programs, wide, wide_value)
    _forward_matrix[programs,](
        product,
        by,
        k_parts,
        q_parts,
        kv,
        *rows,
        matrix,
        matrix_scale,
        product.shape[1],
        count,
        eps,
        scale,
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    shared.applied(q, matrix, matrix_scale, out, query_mask)
    return out, kv, rows


@_sima.register_fake
def _(q, k, v, mask, query_mask, eps):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    programs, wide, wide_value = q.shape[0] * q.shape[1], shared.padded(q.shape[3]), shared.padded(v.shape[3])
    return (
        shared.tokens_first(q, v.shape[3]),
        q.new_empty(programs, wide, wide_value, dtype=torch.float32),
        q.new_empty(3, programs, wide, dtype=torch.float32),
    )


@torch.library.custom_op("sansmax::sima_backward", mutates_args=())
def _sima_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    kv: Tensor,
    rows: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    programs, wide, wide_value = kv.shape
    product, by, _ = shared.gathered(q, grad, query_mask)
    to_q, to_q_scale = shared.matrix(q, programs, wide_value, wide)
    to_k, to_k_scale = shared.matrix(q, programs, wide_value, wide)
    to_v, to_v_scale = shared.matrix(q, programs, wide, wide_value)
    q_shift, k_shift = torch.empty_like(rows[:2])
    _backward_matrices[programs,](
        product,
        by,
        kv,
        *rows,
        to_q,
        to_q_scale,
        q_shift,
        to_k,
        to_k_scale,
        k_shift,
        to_v,
        to_v_scale,
        product.shape[1],
        eps,
        shared.prescale(q.dtype),
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    shared.applied(grad, to_q, to_q_scale, dq, query_mask, "sign", q, q_shift)
    shared.applied(v, to_k, to_k_scale, dk, mask, "sign", k, k_shift)
    shared.applied(k, to_v, to_v_scale, dv, mask)
    return dq, dk, dv


@_sima_backward.register_fake
def _(grad, q, k, v, mask, query_mask, kv, rows, eps):
    return tuple(shared.tokens_first(x, x.shape[3]) for x in (q, k, v))


def _keep(ctx, inputs, output):
    q, k, v, mask, query_mask, ctx.eps = inputs
    _, kv, rows = output
    ctx.save_for_backward(q, k, v, mask, query_mask, kv, rows)


def _differentiate(ctx, grad, *_):
    return *_sima_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


_sima.register_autograd(_differentiate, setup_context=_keep)

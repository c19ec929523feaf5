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
from .._triton import BLOCK, inverse_power, kept, power, store_scaled, sum_of_parts, tokens_of


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
def _forward_matrix(
    product,
    scale,
    total,
    q_parts,
    kv,
    k_total,
    k_scale,
    q_total,
    matrix,
    matrix_scale,
    q_rows,
    parts,
    count,
    eps,
    prescale,
    average,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """k^^T v, and what the queries meet: diag(rows) matrix diag(scale) = diag(1 / sum |q|) k^^T v."""
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc, by = sum_of_parts(product, scale, program, parts, D, E)
    k_sum = tl.zeros([D], tl.float32)
    for part in range(parts):
        at = (program * parts + part) * D + d
        k_sum += tl.load(total + at) * (by / tl.load(scale + at))
    q_sum = tl.zeros([D], tl.float32)
    for part in range(count):
        q_sum += tl.load(q_parts + (program * count + part) * D + d)
    acc /= tl.maximum(k_sum, eps * by)[:, None]
    tl.store(kv + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :], acc)
    tl.store(k_total + program * D + d, k_sum)
    tl.store(k_scale + program * D + d, by)
    tl.store(q_total + program * D + d, q_sum)
    q_sum = tl.maximum(q_sum, eps * prescale)
    tl.store(q_rows + program * D + d, inverse_power(q_sum) * (prescale * average))
    store_scaled(acc * (power(q_sum) / q_sum)[:, None], matrix, matrix_scale, 1 / average, program, D, E)


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
    k_rows,
    parts,
    eps,
    prescale,
    average,
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
    acc, by = sum_of_parts(product, scale, program, parts, D, E)
    m = tl.load(kv + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
    k_sum = tl.load(k_total + program * D + d)
    k_by = tl.load(k_scale + program * D + d)
    q_sum = tl.load(q_total + program * D + d)
    k_free, q_free = k_sum > eps * k_by, q_sum > eps * prescale
    k_sum, q_sum = tl.maximum(k_sum, eps * k_by), tl.maximum(q_sum, eps * prescale)
    dm = acc / q_sum[:, None] * (prescale / by)[:, None]
    c = tl.sum(m * dm, 1)
    store_scaled(tl.trans(m / q_sum[:, None]), to_q, to_q_scale, 1.0, program, E, D)
    store_scaled(tl.trans(dm / k_sum[:, None] * k_by[:, None]), to_k, to_k_scale, 1 / prescale, program, E, D)
    store_scaled(dm * (power(k_sum) / k_sum)[:, None], to_v, to_v_scale, 1 / average, program, D, E)
    tl.store(k_rows + program * D + d, inverse_power(k_sum) * k_by * average)
    tl.store(q_shift + program * D + d, tl.where(q_free, c / q_sum * prescale, 0.0))
    tl.store(k_shift + program * D + d, tl.where(k_free, c / k_sum * k_by, 0.0))


def absolute_sums(q: Tensor, mask: Tensor | None, total: Tensor, per_part: int) -> None:
    """Writes sum |prescale q| of every `per_part` tokens into total (B H, parts, D')."""
    programs, count, wide = total.shape
    _absolute_sums[count, programs](
        q,
        shared.pointer(mask, q),
        total,
        q.shape[2],
        per_part,
        q.shape[1],
        q.shape[3],
        shared.prescale(q.dtype),
        *q.stride(),
        *shared.mask_strides(mask),
        D=wide,
        BLOCK=min(BLOCK, per_part),
        MASKED=mask is not None,
    )


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
    scale = shared.prescale(q.dtype)
    product, by, k_parts = shared.gathered(k, v, mask, summed=True)
    programs, parts, wide, wide_value = product.shape
    count, per_part = shared.parts(q.shape[2], programs, q.device)
    q_parts = torch.empty(programs, count, wide, dtype=torch.float32, device=q.device)
    absolute_sums(q, query_mask, q_parts, per_part)
    out, kv, rows = _empty(q, v)
    matrix, matrix_scale = shared.matrix(q, programs, wide, wide_value)
    q_rows = torch.empty_like(rows[0])
    _forward_matrix[programs,](
        product,
        by,
        k_parts,
        q_parts,
        kv,
        *rows,
        matrix,
        matrix_scale,
        q_rows,
        parts,
        count,
        eps,
        scale,
        shared.average(q.shape[2]),
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    shared.applied(q, matrix, matrix_scale, out, query_mask, rows=q_rows)
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
    q_shift, k_shift, k_rows = torch.empty_like(rows)
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
        k_rows,
        product.shape[1],
        eps,
        shared.prescale(q.dtype),
        shared.average(k.shape[2]),
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    shared.applied(grad, to_q, to_q_scale, dq, query_mask, "sign", q, q_shift)
    shared.applied(v, to_k, to_k_scale, dk, mask, "sign", k, k_shift)
    shared.applied(k, to_v, to_v_scale, dv, mask, rows=k_rows)
    return dq, dk, dv


@_sima_backward.register_fake
def _(grad, q, k, v, mask, query_mask, kv, rows, eps):
    return tuple(shared.tokens_first(x, x.shape[3]) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, grad, *_):
    return *_sima_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


_sima.register_autograd(_differentiate, setup_context=_keep)

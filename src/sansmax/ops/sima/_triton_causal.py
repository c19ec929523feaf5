"""Causal SimA on a GPU, in chunks.

`gather` sums every chunk, a scan turns that into what lies before each chunk, and one program per chunk adds
its own tokens. The backward pass does the same from the end for sum_{i >= j} w_i grad_i^T, w = q / (Sq Sk).

k carries the power of two that its prefix has found (see `gather`), so w has its inverse; float16 is computed
in float32, because w falls with the square of the position.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import dot, kept, tokens_of
from .triton import absolute_sums

CHUNK = 32


@triton.jit
def _scan_forward(product, scale, k_total, q_total, scale_before, chunks, D: tl.constexpr, E: tl.constexpr):
    """What lies before each chunk, in place of the chunk's own sums; scale: up to and with the chunk."""
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc = tl.zeros([D, E], tl.float32)
    k_sum, q_sum = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    by = tl.full([D], 2.0**60, tl.float32)
    for chunk in range(chunks):
        at = program * chunks + chunk
        matrix = product + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :]
        row = at * D + d
        one, own = tl.load(matrix), tl.load(scale + row)
        k_one, q_one = tl.load(k_total + row), tl.load(q_total + row)
        tl.store(matrix, acc)
        tl.store(k_total + row, k_sum)
        tl.store(q_total + row, q_sum)
        tl.store(scale_before + row, by)
        now = tl.minimum(by, own)
        acc = acc * (now / by)[:, None] + one * (now / own)[:, None]
        k_sum = k_sum * (now / by) + k_one * (now / own)
        q_sum += q_one
        by = now
        tl.store(scale + row, by)


@triton.jit
def _chunk(
    q,
    k,
    v,
    mask,
    before,
    scale,
    scale_before,
    k_before,
    q_before,
    program,
    chunk,
    chunks,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    prescale,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk's tokens and sums: q, v, weights, scaled k, the matrix before, Sq, Sk, and where they are
    above eps."""
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), tl.arange(0, E)
    n = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    at = program * chunks + chunk
    row = at * D + d
    by, by_before = tl.load(scale + row), tl.load(scale_before + row)
    values = tokens_of(v, batch, head, n, e, inside, value_dim, v_b, v_h, v_n, v_d)
    queries = tokens_of(q, batch, head, n, d, inside, dim, q_b, q_h, q_n, q_d).to(tl.float32)
    keys = tokens_of(k, batch, head, n, d, inside, dim, k_b, k_h, k_n, k_d).to(tl.float32)
    scaled = keys * by[None, :]
    k_sum = tl.cumsum(tl.abs(scaled), 0) + (tl.load(k_before + row) * (by / by_before))[None, :]
    q_sum = tl.cumsum(tl.abs(queries * prescale), 0) + tl.load(q_before + row)[None, :]
    k_free, q_free = k_sum > (eps * by)[None, :], q_sum > eps * prescale
    k_sum, q_sum = tl.maximum(k_sum, (eps * by)[None, :]), tl.maximum(q_sum, eps * prescale)
    weights = queries * prescale / q_sum / k_sum
    matrix = tl.load(before + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
    matrix *= (by / by_before)[:, None]
    if PRECISION == "tf32x3":
        values = values.to(tl.float32)
    return queries, values, weights, scaled, matrix, q_sum, k_sum, q_free, k_free, by


@triton.jit
def _output(
    q,
    k,
    v,
    mask,
    before,
    scale,
    scale_before,
    k_before,
    q_before,
    out,
    chunks,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    prescale,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    mask_b,
    mask_n,
    out_b,
    out_h,
    out_n,
    out_d,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, program = tl.program_id(0), tl.program_id(1)
    _, values, weights, scaled, matrix, _, _, _, _, _ = _chunk(
        q,
        k,
        v,
        mask,
        before,
        scale,
        scale_before,
        k_before,
        q_before,
        program,
        chunk,
        chunks,
        tokens,
        heads,
        dim,
        value_dim,
        eps,
        prescale,
        q_b,
        q_h,
        q_n,
        q_d,
        k_b,
        k_h,
        k_n,
        k_d,
        v_b,
        v_h,
        v_n,
        v_d,
        mask_b,
        mask_n,
        D,
        E,
        BLOCK,
        MASKED,
        PRECISION,
    )
    i, e = tl.arange(0, BLOCK), tl.arange(0, E)
    weights = weights.to(values.dtype)
    scores = dot(weights, tl.trans(scaled.to(values.dtype)), PRECISION)
    scores = tl.where(i[:, None] >= i[None, :], scores, 0.0).to(values.dtype)
    result = dot(scores, values, PRECISION) + dot(weights, matrix.to(values.dtype), PRECISION)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    n = chunk * BLOCK + i
    at = out + batch * out_b + head * out_h + n.to(tl.int64)[:, None] * out_n + e[None, :] * out_d
    inside = (n < tokens)[:, None] & (e < value_dim)[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grads(grad, values, scaled, matrix, i, PRECISION: tl.constexpr):
    """grad_i P_i^T, P_i = sum_{j <= i} k_j v_j^T at the scale of the chunk."""
    scores = tl.where(i[:, None] >= i[None, :], dot(grad, tl.trans(values), PRECISION), 0.0).to(values.dtype)
    return dot(scores, scaled.to(values.dtype), PRECISION) + dot(
        grad, tl.trans(matrix.to(values.dtype)), PRECISION
    )


@triton.jit
def _backward_totals(
    grad,
    q,
    k,
    v,
    mask,
    before,
    scale,
    scale_before,
    k_before,
    q_before,
    after,
    q_after,
    k_after,
    chunks,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    prescale,
    g_b,
    g_h,
    g_n,
    g_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk's sum_i w_i grad_i^T, and what its outputs say about the sums of |q| and |k|."""
    chunk, program = tl.program_id(0), tl.program_id(1)
    _, values, weights, scaled, matrix, q_sum, k_sum, q_free, k_free, by = _chunk(
        q,
        k,
        v,
        mask,
        before,
        scale,
        scale_before,
        k_before,
        q_before,
        program,
        chunk,
        chunks,
        tokens,
        heads,
        dim,
        value_dim,
        eps,
        prescale,
        q_b,
        q_h,
        q_n,
        q_d,
        k_b,
        k_h,
        k_n,
        k_d,
        v_b,
        v_h,
        v_n,
        v_d,
        mask_b,
        mask_n,
        D,
        E,
        BLOCK,
        MASKED,
        PRECISION,
    )
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    i, d, e = tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, E)
    n = chunk * BLOCK + i
    g = tokens_of(grad, batch, head, n, e, n < tokens, value_dim, g_b, g_h, g_n, g_d).to(values.dtype)
    told = _grads(g, values, scaled, matrix, i, PRECISION) * weights
    at = program * chunks + chunk
    total = dot(tl.trans(weights.to(values.dtype)), g, PRECISION)
    tl.store(after + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :], total)
    tl.store(q_after + at * D + d, tl.sum(tl.where(q_free, told / q_sum, 0.0), 0))
    tl.store(k_after + at * D + d, tl.sum(tl.where(k_free, told / k_sum, 0.0), 0) * by)


@triton.jit
def _scan_backward(after, scale, q_after, k_after, chunks, D: tl.constexpr, E: tl.constexpr):
    """What lies after each chunk, at the chunk's scale, in place of its own."""
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc = tl.zeros([D, E], tl.float32)
    q_sum, k_sum = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    later = tl.load(scale + (program * chunks + chunks - 1) * D + d)
    for back in range(chunks):
        at = program * chunks + chunks - 1 - back
        matrix = after + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :]
        row = at * D + d
        by = tl.load(scale + row)
        acc *= (later / by)[:, None]
        later = by
        one, q_one, k_one = tl.load(matrix), tl.load(q_after + row), tl.load(k_after + row)
        tl.store(matrix, acc)
        tl.store(q_after + row, q_sum)
        tl.store(k_after + row, k_sum)
        acc += one
        q_sum += q_one
        k_sum += k_one


@triton.jit
def _gradients(
    grad,
    q,
    k,
    v,
    mask,
    before,
    scale,
    scale_before,
    k_before,
    q_before,
    after,
    q_after,
    k_after,
    dq,
    dk,
    dv,
    chunks,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    prescale,
    g_b,
    g_h,
    g_n,
    g_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    mask_b,
    mask_n,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With P_i = sum_{j <= i} k_j v_j^T, G_j = sum_{i >= j} w_i grad_i^T and t_i = (P_i grad_i) w_i:

    dq_j = P_j grad_j / (Sq Sk) - sign(q_j) sum_{i >= j} t_i / Sq_i
    dk_j = G_j v_j - sign(k_j) sum_{i >= j} t_i / Sk_i,  dv_j = G_j^T k_j
    """
    chunk, program = tl.program_id(0), tl.program_id(1)
    queries, values, weights, scaled, matrix, q_sum, k_sum, q_free, k_free, by = _chunk(
        q,
        k,
        v,
        mask,
        before,
        scale,
        scale_before,
        k_before,
        q_before,
        program,
        chunk,
        chunks,
        tokens,
        heads,
        dim,
        value_dim,
        eps,
        prescale,
        q_b,
        q_h,
        q_n,
        q_d,
        k_b,
        k_h,
        k_n,
        k_d,
        v_b,
        v_h,
        v_n,
        v_d,
        mask_b,
        mask_n,
        D,
        E,
        BLOCK,
        MASKED,
        PRECISION,
    )
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    i, d, e = tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, E)
    n = chunk * BLOCK + i
    dtype = values.dtype
    g = tokens_of(grad, batch, head, n, e, n < tokens, value_dim, g_b, g_h, g_n, g_d).to(dtype)
    inside = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    at = program * chunks + chunk
    row = n.to(tl.int64)[:, None]
    to_qk = batch * dq_b + head * dq_h + row * dq_n + d[None, :] * dq_d
    to_v = batch * dv_b + head * dv_h + row * dv_n + e[None, :] * dv_d
    on_qk = (n < tokens)[:, None] & (d < dim)[None, :]
    on_v = (n < tokens)[:, None] & (e < value_dim)[None, :]

    # One gradient after the other, and the keys read twice: fewer registers.
    direct = _grads(g, values, scaled, matrix, i, PRECISION)
    told = direct * weights
    by_q = tl.cumsum(tl.where(q_free, told / q_sum, 0.0), 0, reverse=True)
    by_q += tl.load(q_after + at * D + d)[None, :]
    grad_q = (direct / (q_sum * k_sum) - _sign(queries) * by_q) * prescale
    tl.store(dq + to_qk, tl.where(inside[:, None], grad_q, 0.0).to(dq.dtype.element_ty), mask=on_qk)

    by_k = tl.cumsum(tl.where(k_free, told / k_sum, 0.0), 0, reverse=True) * by[None, :]
    by_k += tl.load(k_after + at * D + d)[None, :]
    later = tl.load(after + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :]).to(dtype)
    before_i, weights = i[:, None] <= i[None, :], weights.to(dtype)
    scores = tl.where(before_i, dot(values, tl.trans(g), PRECISION), 0.0).to(dtype)
    grad_k = dot(scores, weights, PRECISION) + dot(values, tl.trans(later), PRECISION)
    keys = tokens_of(k, batch, head, n, d, inside, dim, k_b, k_h, k_n, k_d).to(tl.float32)
    grad_k = grad_k * by[None, :] - _sign(keys) * by_k
    tl.store(dk + to_qk, tl.where(inside[:, None], grad_k, 0.0).to(dk.dtype.element_ty), mask=on_qk)

    scaled = (keys * by[None, :]).to(dtype)
    scores = tl.where(before_i, dot(scaled, tl.trans(weights), PRECISION), 0.0).to(dtype)
    grad_v = dot(scores, g, PRECISION) + dot(scaled, later, PRECISION)
    tl.store(dv + to_v, tl.where(inside[:, None], grad_v, 0.0).to(dv.dtype.element_ty), mask=on_v)


@triton.jit
def _sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


def sima(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    return _sima(q, k, v, mask, eps)


def _states(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Sums before each chunk: k v^T, its scale with and without the chunk, |k|, |q|."""
    product, scale, k_total = shared.gathered(k, v, mask, chunk=CHUNK, summed=True)
    q_total, before = torch.empty_like(scale), torch.empty_like(scale)
    absolute_sums(q, mask, q_total, CHUNK)
    programs, chunks, wide, wide_value = product.shape
    _scan_forward[programs,](
        product, scale, k_total, q_total, before, chunks, D=wide, E=wide_value, num_warps=8
    )
    return product, scale, before, k_total, q_total


def _sizes(q: Tensor, v: Tensor, eps: float) -> tuple:
    chunks = triton.cdiv(q.shape[2], CHUNK)
    return chunks, q.shape[2], q.shape[1], q.shape[3], v.shape[3], eps, shared.prescale(q.dtype)


def _constants(q: Tensor, v: Tensor, mask: Tensor | None, wide: bool) -> dict:
    """`wide`: half precision is computed in float32."""
    dim, value_dim = shared.padded(q.shape[3]), shared.padded(v.shape[3])
    return {
        "D": dim,
        "E": value_dim,
        "BLOCK": CHUNK,
        "MASKED": mask is not None,
        "PRECISION": "tf32x3" if wide else "ieee",
        "num_warps": 8,
    }


@torch.library.custom_op("sansmax::sima_causal", mutates_args=())
def _sima(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    out = shared.tokens_first(q, v.shape[3])
    grid = triton.cdiv(q.shape[2], CHUNK), q.shape[0] * q.shape[1]
    _output[grid](
        q,
        k,
        v,
        shared.pointer(mask, q),
        *_states(q, k, v, mask),
        out,
        *_sizes(q, v, eps),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *shared.mask_strides(mask),
        *out.stride(),
        **_constants(q, v, mask, wide=q.dtype != torch.bfloat16),
    )
    return out


@_sima.register_fake
def _(q, k, v, mask, eps):
    return shared.tokens_first(q, v.shape[3])


@torch.library.custom_op("sansmax::sima_causal_backward", mutates_args=())
def _sima_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    states = _states(q, k, v, mask)
    after, q_after, k_after = (torch.empty_like(t) for t in (states[0], states[1], states[1]))
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    chunks, programs = triton.cdiv(q.shape[2], CHUNK), q.shape[0] * q.shape[1]
    tensors = grad, q, k, v, shared.pointer(mask, q), *states, after, q_after, k_after
    strides = *grad.stride(), *q.stride(), *k.stride(), *v.stride(), *shared.mask_strides(mask)
    # Where a token holds most of its prefix's sum, as the first does, terms of 1 / |k| cancel: in
    # bfloat16 the error was 12 times the largest gradient.
    words = _constants(q, v, mask, wide=True)
    _backward_totals[chunks, programs](*tensors, *_sizes(q, v, eps), *strides, **words)
    _scan_backward[programs,](
        after, states[1], q_after, k_after, chunks, D=words["D"], E=words["E"], num_warps=8
    )
    _gradients[chunks, programs](
        *tensors, dq, dk, dv, *_sizes(q, v, eps), *strides, *dq.stride(), *dv.stride(), **words
    )
    return dq, dk, dv


@_sima_backward.register_fake
def _(grad, q, k, v, mask, eps):
    return tuple(shared.tokens_first(x, x.shape[3]) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *_sima_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


_sima.register_autograd(_differentiate, setup_context=_keep)

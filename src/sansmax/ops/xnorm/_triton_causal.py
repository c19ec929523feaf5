"""Causal XNorm on a GPU, in chunks.

    M_i = sum_{j <= i} k_j v_j^T,  u_i = M_i / max(|M_i|, eps) by columns,  out_i = gamma^2 q^_i u_i

The lengths of the columns change with every token, so a program walks the tokens of a chunk one by one with
M in registers. Columns do not meet, so a program owns a few of them; the sums over columns that dq and dk
need are added up afterwards. One walk sums every chunk, and a scan turns that into what lies before each chunk.
The backward pass does the same from the end for the gradient of M.

|M_i|^2 from |M_{i-1}|^2 by matrix products would cancel where a column shrinks inside a chunk.

A column of M is kept as numbers near 1 and a power of two, found anew with every token, so that neither its
square nor a product k v leaves float32, and what remains where large tokens cancel is not lost.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import inverse_power, kept, tokens_of, unit
from .triton import _gamma

# Tokens of a chunk at least; wide values take more, so that the states before the chunks, in float32, are
# 1.3 times q, k and v in bfloat16 for heads of 64 and of 128.
CHUNK = 32
# Tokens that the backward pass walks again from their first, before each of which it walks from the chunk's.
SPAN = 8
# Columns of a program; the backward pass keeps as many float32 numbers for every token as there are blocks.
COLUMNS = 16
COLUMNS_BACKWARD = 32
# The walk that sums a chunk sees no lengths: its products lie above 2^-226 of the largest.
SUM_SHIFT = 100
SMALLEST = tl.constexpr(2.0**-64)
NOTHING = tl.constexpr(-1000)


@triton.jit
def _exponent(x):
    """The exponent of the power of two at or below |x|, from -126 to 126."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits >> 23, 1), 253) - 127


@triton.jit
def _two(exponent):
    """2^exponent: 0 below -126, at most 2^127."""
    return (tl.minimum(tl.maximum(exponent + 127, 0), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows(
    q,
    k,
    mask,
    exponents,
    near,
    inverse,
    tokens,
    heads,
    dim,
    eps,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The exponent of the largest entry of each key, and q^ = q near inverse with a power of two first."""
    block, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, n = tl.arange(0, D), block * BLOCK + tl.arange(0, BLOCK)
    inside = n < tokens
    keep = kept(mask, batch, n, inside, mask_b, mask_n, MASKED)
    keys = tokens_of(k, batch, head, n, d, keep, dim, k_b, k_h, k_n, k_d).to(tl.float32)
    queries = tokens_of(q, batch, head, n, d, inside, dim, q_b, q_h, q_n, q_d).to(tl.float32)
    at = program.to(tl.int64) * tokens + n
    tl.store(exponents + at, _exponent(tl.max(tl.abs(keys), 1)), mask=inside)
    by = inverse_power(tl.max(tl.abs(queries), 1))
    queries *= by[:, None]
    tl.store(near + at, by, mask=inside)
    tl.store(inverse + at, 1 / tl.maximum(tl.sqrt(tl.sum(queries * queries, 1)), eps * by), mask=inside)


@triton.jit
def _pair(k, v, mask, exponents, n, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED: tl.constexpr):
    """The key of a token, its largest entry about 1, the exponent that was taken off, and its values."""
    if MASKED:
        keep = (tl.load(mask + n * mask_n) != 0).to(tl.int32)
        dim, value_dim = dim * keep, value_dim * keep
    at = n.to(tl.int64)
    exponent = tl.load(exponents + n)
    key = tl.load(k + at * k_n + d * k_d, mask=d < dim, other=0.0).to(tl.float32)
    values = tl.load(v + at * v_n + e * v_d, mask=e < value_dim, other=0.0).to(tl.float32)
    return key * _two(-exponent), exponent, values


@triton.jit
def _query(q, near, inverse, n, d, dim, q_n, q_d):
    """The unit query of a token."""
    query = tl.load(q + n.to(tl.int64) * q_n + d * q_d, mask=d < dim, other=0.0).to(tl.float32)
    return query * tl.load(near + n) * tl.load(inverse + n)


@triton.jit
def _add(m, scale, target, key, exponent, values, SHIFT: tl.constexpr = 0):
    """M + k v^T for M = m 2^scale, at the scale `target` or, if larger, at that of the product.

    The product is rounded before it is added, so that a token and its negative leave nothing.
    """
    own = _exponent(values)
    now = tl.maximum(target, exponent + own - SHIFT)
    values = values * _two(-own) * _two(exponent + own - now)
    change = tl.broadcast_to(_two(scale - now)[None, :], m.shape)
    return tl.fma(m, change, key[:, None] * values[None, :]), now


@triton.jit
def _measured(m, scale, query, eps, lowest):
    """q^ u, the divisor of m, whether that is its length, and the scale at which m is about 1."""
    norm = tl.sqrt(tl.sum(m * m, 0))
    floor = tl.maximum(eps * _two(-scale), SMALLEST)
    length = tl.maximum(norm, floor)
    row = tl.sum(query[:, None] * m, 0) / length
    return row, length, norm > floor, tl.maximum(scale + _exponent(norm), lowest)


@triton.jit
def _settled(m, scale, lowest):
    """The same M with columns whose largest entries are about 1."""
    now = tl.maximum(scale + _exponent(tl.max(tl.abs(m), 0)), lowest)
    return m * _two(scale - now)[None, :], now


@triton.jit
def _sums(
    k,
    v,
    mask,
    exponents,
    product,
    scales,
    tokens,
    heads,
    dim,
    value_dim,
    lowest,
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A chunk's own sum of k v^T."""
    chunk, program = tl.program_id(0) // (E // COLUMNS), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), tl.program_id(0) % (E // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.num_programs(0) // (E // COLUMNS)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    mask += batch * mask_b
    exponents += program.to(tl.int64) * tokens
    m, scale = tl.zeros([D, COLUMNS], tl.float32), tl.full([COLUMNS], 0, tl.int32) + lowest
    for n in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)):
        n = tl.full([], 0, tl.int32) + n
        key, exponent, values = _pair(
            k, v, mask, exponents, n, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
        )
        m, scale = _add(m, scale, scale, key, exponent, values, SHIFT)
    m, scale = _settled(m, scale, lowest)
    at = (program * chunks + chunk).to(tl.int64)
    tl.store(product + at * D * E + d[:, None] * E + e[None, :], m)
    tl.store(scales + at * E + e, scale)


@triton.jit
def _scan_forward(product, scales, chunks, lowest, D: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr):
    """What lies before each chunk, in place of the chunk's own sum."""
    program = tl.program_id(1)
    d, e = tl.arange(0, D), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m, scale = tl.zeros([D, COLUMNS], tl.float32), tl.full([COLUMNS], 0, tl.int32) + lowest
    for chunk in range(chunks):
        at = (program * chunks + chunk).to(tl.int64)
        matrix = product + at * D * E + d[:, None] * E + e[None, :]
        one, own = tl.load(matrix), tl.load(scales + at * E + e)
        tl.store(matrix, m)
        tl.store(scales + at * E + e, scale)
        now = tl.maximum(scale, own)
        m = m * _two(scale - now)[None, :] + one * _two(own - now)[None, :]
        m, scale = _settled(m, now, lowest)


@triton.jit
def _output(
    q,
    k,
    v,
    gamma,
    mask,
    exponents,
    near,
    inverse,
    before,
    scales,
    out,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    lowest,
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    chunk, program = tl.program_id(0) // (E // COLUMNS), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), tl.program_id(0) % (E // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.num_programs(0) // (E // COLUMNS)
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    out += batch * out_b + head * out_h
    mask += batch * mask_b
    exponents += program.to(tl.int64) * tokens
    near += program.to(tl.int64) * tokens
    inverse += program.to(tl.int64) * tokens
    factor = _gamma(gamma, program, heads, GAMMA)
    at = (program * chunks + chunk).to(tl.int64)
    m = tl.load(before + at * D * E + d[:, None] * E + e[None, :])
    scale = tl.load(scales + at * E + e)
    target = scale
    for n in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)):
        n = tl.full([], 0, tl.int32) + n
        key, exponent, values = _pair(
            k, v, mask, exponents, n, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
        )
        m, scale = _add(m, scale, target, key, exponent, values)
        query = _query(q, near, inverse, n, d, dim, q_n, q_d)
        row, _, _, target = _measured(m, scale, query, eps, lowest)
        row = (row * (factor * factor)).to(out.dtype.element_ty)
        tl.store(out + n.to(tl.int64) * out_n + e * out_d, row, mask=e < value_dim)


@triton.jit
def _gradient_of_matrix(row, length, free, grad):
    """a, b and their exponent: the gradient of m is (q^ a - m b) 2^exponent, with u = m / length and
    o = q^ u: (q^ g - u o g) / length."""
    left = grad / length
    right = tl.where(free, left * row / length, 0.0)
    exponent = _exponent(left)
    small = _two(-exponent)
    return left * small, right * small, exponent


@triton.jit
def _backward_totals(
    grad,
    q,
    k,
    v,
    gamma,
    mask,
    exponents,
    near,
    inverse,
    before,
    scales,
    token_scales,
    total,
    total_scales,
    partial,
    gamma_grad,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    lowest,
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A chunk's sum of the gradients of M_i; the scales of M_i; sums over columns of u grad, which is the
    gradient of q^ without gamma, and of o grad."""
    block, chunk, program = (
        tl.program_id(0) % (E // COLUMNS),
        tl.program_id(0) // (E // COLUMNS),
        tl.program_id(1),
    )
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.num_programs(0) // (E // COLUMNS)
    grad += batch * g_b + head * g_h
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    mask += batch * mask_b
    exponents += program.to(tl.int64) * tokens
    near += program.to(tl.int64) * tokens
    inverse += program.to(tl.int64) * tokens
    token_scales += program.to(tl.int64) * tokens * E
    partial += (block.to(tl.int64) * tl.num_programs(1) + program) * tokens * D
    factor = _gamma(gamma, program, heads, GAMMA)
    at = (program * chunks + chunk).to(tl.int64)
    m = tl.load(before + at * D * E + d[:, None] * E + e[None, :])
    scale = tl.load(scales + at * E + e)
    target = scale
    acc, power = tl.zeros([D, COLUMNS], tl.float32), tl.full([COLUMNS], NOTHING, tl.int32)
    along = tl.zeros([COLUMNS], tl.float32)
    for n in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)):
        n = tl.full([], 0, tl.int32) + n
        key, exponent, values = _pair(
            k, v, mask, exponents, n, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
        )
        m, scale = _add(m, scale, target, key, exponent, values)
        query = _query(q, near, inverse, n, d, dim, q_n, q_d)
        row, length, free, target = _measured(m, scale, query, eps, lowest)
        tl.store(token_scales + n.to(tl.int64) * E + e, scale)
        g = tl.load(grad + n.to(tl.int64) * g_n + e * g_d, mask=e < value_dim, other=0.0).to(tl.float32)
        along += row * g
        g *= factor * factor
        tl.store(partial + n.to(tl.int64) * D + d, tl.sum(m * (g / length)[None, :], 1))
        left, right, own = _gradient_of_matrix(row, length, free, g)
        now = tl.maximum(power, own - scale)
        by = _two(own - scale - now)
        one = query[:, None] * (left * by)[None, :] - m * (right * by)[None, :]
        acc = acc * _two(power - now)[None, :] + one
        power = now
    tl.store(total + at * D * E + d[:, None] * E + e[None, :], acc)
    tl.store(total_scales + at * E + e, power)
    tl.store(gamma_grad + at * (E // COLUMNS) + block, tl.sum(along))


@triton.jit
def _scan_backward(total, scales, chunks, D: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr):
    """What lies after each chunk, in place of the chunk's own sum."""
    program = tl.program_id(1)
    d, e = tl.arange(0, D), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc, power = tl.zeros([D, COLUMNS], tl.float32), tl.full([COLUMNS], NOTHING, tl.int32)
    for back in range(chunks):
        at = (program * chunks + chunks - 1 - back).to(tl.int64)
        matrix = total + at * D * E + d[:, None] * E + e[None, :]
        one, own = tl.load(matrix), tl.load(scales + at * E + e)
        tl.store(matrix, acc)
        tl.store(scales + at * E + e, power)
        now = tl.maximum(power, own)
        acc = acc * _two(power - now)[None, :] + one * _two(own - now)[None, :]
        power = now


@triton.jit
def _gradients(
    grad,
    q,
    k,
    v,
    gamma,
    mask,
    exponents,
    near,
    inverse,
    before,
    scales,
    token_scales,
    after,
    after_scales,
    partial,
    dv,
    tokens,
    heads,
    dim,
    value_dim,
    eps,
    lowest,
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
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    D: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """With G_j = sum_{i >= j} dM_i: dv_j = k_j G_j, and sums over columns of dk_j = G_j v_j.

    Tokens from the last to the first; M_i is summed again from the first token of its span, for to subtract
    the later tokens from M would lose what is far smaller than they are.
    """
    block, chunk, program = (
        tl.program_id(0) % (E // COLUMNS),
        tl.program_id(0) // (E // COLUMNS),
        tl.program_id(1),
    )
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.num_programs(0) // (E // COLUMNS)
    grad += batch * g_b + head * g_h
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    dv += batch * dv_b + head * dv_h
    mask += batch * mask_b
    exponents += program.to(tl.int64) * tokens
    near += program.to(tl.int64) * tokens
    inverse += program.to(tl.int64) * tokens
    token_scales += program.to(tl.int64) * tokens * E
    partial += (block.to(tl.int64) * tl.num_programs(1) + program) * tokens * D
    factor = _gamma(gamma, program, heads, GAMMA)
    at = (program * chunks + chunk).to(tl.int64)
    acc = tl.load(after + at * D * E + d[:, None] * E + e[None, :])
    power = tl.load(after_scales + at * E + e)
    start, stop = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)
    spans = tl.cdiv(stop - start, SPAN)
    for span in range(spans):
        first = start + (spans - 1 - span) * SPAN
        opening = tl.load(before + at * D * E + d[:, None] * E + e[None, :])
        opening_scale = tl.load(scales + at * E + e)
        for i in range(start, first):
            i = tl.full([], 0, tl.int32) + i
            key, exponent, values = _pair(
                k, v, mask, exponents, i, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
            )
            target = tl.load(token_scales + i.to(tl.int64) * E + e)
            opening, opening_scale = _add(opening, opening_scale, target, key, exponent, values)
        last = tl.minimum(first + SPAN, stop) - 1
        for back in range(last - first + 1):
            n = last - back
            m, scale = opening, opening_scale
            for i in range(first, n + 1):
                i = tl.full([], 0, tl.int32) + i
                key, exponent, values = _pair(
                    k, v, mask, exponents, i, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
                )
                target = tl.load(token_scales + i.to(tl.int64) * E + e)
                m, scale = _add(m, scale, target, key, exponent, values)
            query = _query(q, near, inverse, n, d, dim, q_n, q_d)
            row, length, free, _ = _measured(m, scale, query, eps, lowest)
            g = tl.load(grad + n.to(tl.int64) * g_n + e * g_d, mask=e < value_dim, other=0.0)
            left, right, own = _gradient_of_matrix(row, length, free, g.to(tl.float32) * (factor * factor))
            now = tl.maximum(power, own - scale)
            by = _two(own - scale - now)
            one = query[:, None] * (left * by)[None, :] - m * (right * by)[None, :]
            acc = acc * _two(power - now)[None, :] + one
            power = now
            key, exponent, values = _pair(
                k, v, mask, exponents, n, d, e, dim, value_dim, k_n, k_d, v_n, v_d, mask_n, MASKED
            )
            own = _exponent(values)
            values = values * _two(-own) * _two(own + power)
            tl.store(partial + n.to(tl.int64) * D + d, tl.sum(acc * values[None, :], 1))
            dv_row = tl.sum(acc * key[:, None], 0) * _two(exponent + power)
            at_v = dv + n.to(tl.int64) * dv_n + e * dv_d
            tl.store(at_v, dv_row.to(dv.dtype.element_ty), mask=e < value_dim)


@triton.jit
def _added(
    partial,
    x,
    out,
    blocks,
    tokens,
    heads,
    dim,
    eps,
    x_b,
    x_h,
    x_n,
    x_d,
    out_b,
    out_h,
    out_n,
    out_d,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The sum over blocks of columns; UNIT: it is the gradient of the unit x, wanted is that of x."""
    program = tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, n = tl.arange(0, D), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < tokens
    result = tl.zeros([BLOCK, D], tl.float32)
    for block in range(blocks):
        at = (program + block * tl.num_programs(1)).to(tl.int64) * tokens + n
        result += tl.load(partial + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    if UNIT:
        rows = tokens_of(x, batch, head, n, d, inside, dim, x_b, x_h, x_n, x_d)
        direction, by, free = unit(rows, eps)
        along = tl.where(free, tl.sum(result * direction, 1), 0.0)
        result = (result - direction * along[:, None]) * by[:, None]
    at = out + batch * out_b + head * out_h + n.to(tl.int64)[:, None] * out_n + d[None, :] * out_d
    tl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None] & (d < dim)[None, :])


def xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    return _xnorm(q, k, v, gamma, mask, eps)


class _Walk:
    """What the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float):
        batch, heads, tokens, dim = q.shape
        self.wide, self.wide_value = shared.padded(dim), shared.padded(v.shape[3])
        self.chunk = max(CHUNK, CHUNK * self.wide_value // 64)
        self.chunks, self.programs = triton.cdiv(tokens, self.chunk), batch * heads
        self.eps = max(eps, 2.0**-126)
        self.lowest = math.frexp(self.eps)[1] - 1
        self.exponents = q.new_empty(self.programs, tokens, dtype=torch.int32)
        self.near, self.inverse = q.new_empty(2, self.programs, tokens, dtype=torch.float32)
        strides = *k.stride(), *v.stride(), *shared.mask_strides(mask)
        _rows[triton.cdiv(tokens, shared.BLOCK), self.programs](
            q,
            k,
            shared.pointer(mask, q),
            self.exponents,
            self.near,
            self.inverse,
            tokens,
            heads,
            dim,
            self.eps,
            *q.stride(),
            *k.stride(),
            *shared.mask_strides(mask),
            D=self.wide,
            BLOCK=shared.BLOCK,
            MASKED=mask is not None,
        )
        self.state, self.scales = self.empty()
        grid, words = self.launch(COLUMNS)
        _sums[grid](
            k,
            v,
            shared.pointer(mask, q),
            self.exponents,
            self.state,
            self.scales,
            tokens,
            heads,
            dim,
            v.shape[3],
            self.lowest,
            *strides,
            CHUNK=self.chunk,
            SHIFT=SUM_SHIFT,
            MASKED=mask is not None,
            **words,
        )
        _scan_forward[grid[0] // self.chunks, self.programs](
            self.state, self.scales, self.chunks, self.lowest, **words
        )

    def empty(self) -> tuple[Tensor, Tensor]:
        """A matrix for each chunk, and the exponents of its columns."""
        scales = self.exponents.new_empty(self.programs, self.chunks, self.wide_value)
        state = self.near.new_empty(self.programs, self.chunks, self.wide, self.wide_value)
        return state, scales

    def launch(self, columns: int) -> tuple[tuple[int, int], dict]:
        """The grid of a walk, and the constants: a matrix takes 32 registers of a thread."""
        columns = min(columns, self.wide_value)
        words = {
            "D": self.wide,
            "E": self.wide_value,
            "COLUMNS": columns,
            "num_warps": max(1, self.wide * columns // 1024),
        }
        return (self.chunks * (self.wide_value // columns), self.programs), words


@torch.library.custom_op("sansmax::xnorm_causal", mutates_args=())
def _xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    out, walk = shared.tokens_first(q, v.shape[3]), _Walk(q, k, v, mask, eps)
    grid, words = walk.launch(COLUMNS)
    _output[grid](
        q,
        k,
        v,
        q if gamma is None else gamma,
        shared.pointer(mask, q),
        walk.exponents,
        walk.near,
        walk.inverse,
        walk.state,
        walk.scales,
        out,
        q.shape[2],
        q.shape[1],
        q.shape[3],
        v.shape[3],
        walk.eps,
        walk.lowest,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *shared.mask_strides(mask),
        *out.stride(),
        CHUNK=walk.chunk,
        GAMMA=gamma is not None,
        MASKED=mask is not None,
        **words,
    )
    return out


@_xnorm.register_fake
def _(q, k, v, gamma, mask, eps):
    return shared.tokens_first(q, v.shape[3])


@torch.library.custom_op("sansmax::xnorm_causal_backward", mutates_args=())
def _xnorm_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and (B, H) the sum of grad out without gamma, for each image."""
    walk = _Walk(q, k, v, mask, eps)
    grid, words = walk.launch(COLUMNS_BACKWARD)
    words |= {"CHUNK": walk.chunk, "GAMMA": gamma is not None, "MASKED": mask is not None}
    blocks = grid[0] // walk.chunks
    total, total_scales = walk.empty()
    token_scales = walk.exponents.new_empty(walk.programs, q.shape[2], walk.wide_value)
    partial = walk.near.new_empty(blocks, walk.programs, q.shape[2], walk.wide)
    gamma_grad = walk.near.new_empty(*q.shape[:2], walk.chunks * blocks)
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    tensors = (
        grad,
        q,
        k,
        v,
        q if gamma is None else gamma,
        shared.pointer(mask, q),
        walk.exponents,
        walk.near,
        walk.inverse,
        walk.state,
        walk.scales,
        token_scales,
        total,
        total_scales,
        partial,
    )
    sizes = q.shape[2], q.shape[1], q.shape[3], v.shape[3], walk.eps, walk.lowest
    strides = *grad.stride(), *q.stride(), *k.stride(), *v.stride(), *shared.mask_strides(mask)
    _backward_totals[grid](*tensors, gamma_grad, *sizes, *strides, **words)
    _sum_blocks(partial, q, dq, walk.eps, True)
    matrices = {name: words[name] for name in ("D", "E", "COLUMNS", "num_warps")}
    _scan_backward[blocks, walk.programs](total, total_scales, walk.chunks, **matrices)
    _gradients[grid](*tensors, dv, *sizes, *strides, *dv.stride(), SPAN=SPAN, **words)
    _sum_blocks(partial, k, dk, walk.eps, False)
    return dq, dk, dv, gamma_grad.sum(-1)


def _sum_blocks(partial: Tensor, x: Tensor, out: Tensor, eps: float, unit: bool) -> None:
    blocks, programs, tokens, wide = partial.shape
    _added[triton.cdiv(tokens, shared.BLOCK), programs](
        partial,
        x,
        out,
        blocks,
        tokens,
        x.shape[1],
        x.shape[3],
        eps,
        *x.stride(),
        *out.stride(),
        D=wide,
        BLOCK=shared.BLOCK,
        UNIT=unit,
    )


@_xnorm_backward.register_fake
def _(grad, q, k, v, gamma, mask, eps):
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(q.shape[:2], dtype=torch.float32)


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    gamma = ctx.saved_tensors[3]
    dq, dk, dv, along = _xnorm_backward(grad, *ctx.saved_tensors, ctx.eps)
    if gamma is not None:
        gamma = (2 * gamma * along.sum(0)).to(gamma.dtype)
    return dq, dk, dv, gamma, None, None


_xnorm.register_autograd(_differentiate, setup_context=_keep)

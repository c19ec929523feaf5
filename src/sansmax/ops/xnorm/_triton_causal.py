"""Causal XNorm on a GPU, in chunks.

    M_i = sum_{j <= i} k_j v_j^T,  u_i = M_i / max(|M_i|, eps) by columns,  out_i = gamma^2 q^_i u_i

The lengths of the columns change with every token, so a program walks the tokens of a chunk one by one with
M in registers. Columns do not meet, so a program owns a few of them; the sums over columns that dq and dk
need are added up afterwards. One walk sums every chunk, and a scan turns that into what lies before each
chunk. The backward pass does the same from the end for the gradient of M.

|M_i|^2 from |M_{i-1}|^2 by matrix products would cancel where a column shrinks inside a chunk.

A column of M is kept as numbers near 1 and a power of two, found anew with every token, so that neither its
square nor a product k v leaves float32, and what remains where large tokens cancel is not lost.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import INTERPRETED, inverse_power, kept, tokens_of, unit
from .triton import _gamma

# Tokens of a chunk; values wider than 64 take more, so that the states before the chunks, in float32, are 1.3
# times q, k and v in bfloat16. The interpreter's tests see several chunks.
CHUNK = 4 if INTERPRETED else 32
# The backward pass walks to each token from the first of its span, and there from the first of the chunk.
SPAN = 3 if INTERPRETED else 8
# Columns of a program; the backward pass keeps as many float32 numbers for every token as there are blocks.
COLUMNS = 16
COLUMNS_BACKWARD = 32
# Entries of M in a program, 32 registers of a thread for each warp: where heads are narrow, several chunks.
ENTRIES = 2**16 if INTERPRETED else 2**10
# The walk that sums a chunk sees no lengths: products down to 2^-240 of the largest count, and 64 fit.
SUM_SHIFT = 116
SMALLEST = tl.constexpr(2.0**-63)
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
    padded,
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
    keep = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    keys = tokens_of(k, batch, head, n, d, keep, dim, k_b, k_h, k_n, k_d).to(tl.float32)
    queries = tokens_of(q, batch, head, n, d, n < tokens, dim, q_b, q_h, q_n, q_d).to(tl.float32)
    at = program.to(tl.int64) * padded + n
    tl.store(exponents + at, _exponent(tl.max(tl.abs(keys), 1)), mask=n < padded)
    by = inverse_power(tl.max(tl.abs(queries), 1))
    queries *= by[:, None]
    tl.store(near + at, by, mask=n < padded)
    length = tl.maximum(tl.sqrt(tl.sum(queries * queries, 1)), eps * by)
    tl.store(inverse + at, 1 / length, mask=n < padded)


@triton.jit
def _place(lines, chunks, heads, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """The chunks that a program walks, counted over all heads; image, head and first token of each.

    Programs past the end repeat the last chunk.
    """
    line = tl.minimum(tl.program_id(0) * GROUP + tl.arange(0, GROUP), lines - 1)
    program = line // chunks
    return line.to(tl.int64), program // heads, program % heads, line % chunks * CHUNK


@triton.jit
def _matrices(pointer, line, d, e, D: tl.constexpr, E: tl.constexpr):
    return pointer + line[:, None, None] * D * E + d[None, :, None] * E + e[None, None, :]


@triton.jit
def _token(pointer, batch, head, n, d, inside, width, stride_b, stride_h, stride_n, stride_d):
    """A token of each chunk, zeros outside."""
    at = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + n.to(tl.int64) * stride_n
    at = pointer + at[:, None] + d[None, :] * stride_d
    return tl.load(at, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _pair(
    k,
    v,
    mask,
    exponents,
    line,
    batch,
    head,
    start,
    i,
    d,
    e,
    tokens,
    dim,
    value_dim,
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
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The key of token i of a chunk, its largest entry about 1, the exponent taken off, and its values."""
    n = start + i
    keep = n < tokens
    if MASKED:
        keep &= tl.load(mask + batch.to(tl.int64) * mask_b + n * mask_n, mask=keep, other=0) != 0
    key = _token(k, batch, head, n, d, keep, dim, k_b, k_h, k_n, k_d)
    values = _token(v, batch, head, n, e, keep, value_dim, v_b, v_h, v_n, v_d)
    exponent = tl.load(exponents + line * CHUNK + i)
    return key * _two(-exponent)[:, None], exponent, values


@triton.jit
def _query(
    q,
    near,
    inverse,
    line,
    batch,
    head,
    start,
    i,
    d,
    tokens,
    dim,
    q_b,
    q_h,
    q_n,
    q_d,
    CHUNK: tl.constexpr,
):
    """The unit query of a token."""
    n, at = start + i, line * CHUNK + i
    query = _token(q, batch, head, n, d, n < tokens, dim, q_b, q_h, q_n, q_d)
    return query * tl.load(near + at)[:, None] * tl.load(inverse + at)[:, None]


@triton.jit
def _add(m, scale, target, key, exponent, values, SHIFT: tl.constexpr = 0):
    """M + k v^T for M = m 2^scale, at the scale `target` or, if larger, at that of the product.

    The product is rounded before it is added, so that a token and its negative leave nothing.
    """
    own = _exponent(values)
    both = exponent[:, None] + own
    now = tl.maximum(target, both - SHIFT)
    values = values * _two(-own) * _two(both - now)
    change = tl.broadcast_to(_two(scale - now)[:, None, :], m.shape)
    return tl.fma(m, change, key[:, :, None] * values[:, None, :]), now


@triton.jit
def _measured(m, scale, query, eps, lowest):
    """q^ m, the divisor of m, q^ m / |m|^2 (0 if the divisor is not |m|), and the scale at which m is
    about 1."""
    squares = tl.sum(m * m, 1)
    row = tl.sum(query[:, :, None] * m, 1)
    norm = tl.sqrt(squares)
    floor = tl.maximum(eps * _two(-scale), SMALLEST)
    length = tl.maximum(norm, floor)
    along = tl.where(norm > floor, row / tl.maximum(squares, SMALLEST * SMALLEST), 0.0)
    target = tl.where(squares > 0, tl.maximum(scale + _exponent(norm), lowest), lowest)
    return row / length, length, along, target


@triton.jit
def _settled(m, scale, lowest):
    """The same M with columns whose largest entries are about 1."""
    top = tl.max(tl.abs(m), 1)
    now = tl.where(top > 0, tl.maximum(scale + _exponent(top), lowest), lowest)
    return m * _two(scale - now)[:, None, :], now


@triton.jit
def _sums(
    k,
    v,
    mask,
    exponents,
    product,
    scales,
    lines,
    chunks,
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
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A chunk's own sum of k v^T."""
    line, batch, head, start = _place(lines, chunks, heads, CHUNK, GROUP)
    d, e = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m, scale = tl.zeros([GROUP, D, COLUMNS], tl.float32), tl.zeros([GROUP, COLUMNS], tl.int32) + lowest
    for i in range(tl.minimum(CHUNK, tokens)):
        key, exponent, values = _pair(
            k,
            v,
            mask,
            exponents,
            line,
            batch,
            head,
            start,
            i,
            d,
            e,
            tokens,
            dim,
            value_dim,
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
            CHUNK,
            MASKED,
        )
        m, scale = _add(m, scale, scale, key, exponent, values, SHIFT)
    m, scale = _settled(m, scale, lowest)
    tl.store(_matrices(product, line, d, e, D, E), m)
    tl.store(scales + line[:, None] * E + e[None, :], scale)


@triton.jit
def _scan_forward(
    product,
    scales,
    programs,
    chunks,
    lowest,
    D: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What lies before each chunk, in place of the chunk's own sum."""
    program = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    d, e = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = program < programs
    m, scale = tl.zeros([GROUP, D, COLUMNS], tl.float32), tl.zeros([GROUP, COLUMNS], tl.int32) + lowest
    for chunk in range(chunks):
        line = program * chunks + chunk
        matrix = _matrices(product, line, d, e, D, E)
        place = scales + line[:, None] * E + e[None, :]
        one = tl.load(matrix, mask=inside[:, None, None], other=0.0)
        own = tl.load(place, mask=inside[:, None], other=0)
        tl.store(matrix, m, mask=inside[:, None, None])
        tl.store(place, scale, mask=inside[:, None])
        now = tl.maximum(scale, own)
        m = m * _two(scale - now)[:, None, :] + one * _two(own - now)[:, None, :]
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
    lines,
    chunks,
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
    GROUP: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    line, batch, head, start = _place(lines, chunks, heads, CHUNK, GROUP)
    d, e = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.zeros([GROUP], tl.float32) + _gamma(gamma, head, heads, GAMMA)
    m = tl.load(_matrices(before, line, d, e, D, E))
    scale = tl.load(scales + line[:, None] * E + e[None, :])
    target = scale
    for i in range(tl.minimum(CHUNK, tokens)):
        key, exponent, values = _pair(
            k,
            v,
            mask,
            exponents,
            line,
            batch,
            head,
            start,
            i,
            d,
            e,
            tokens,
            dim,
            value_dim,
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
            CHUNK,
            MASKED,
        )
        m, scale = _add(m, scale, target, key, exponent, values)
        query = _query(
            q,
            near,
            inverse,
            line,
            batch,
            head,
            start,
            i,
            d,
            tokens,
            dim,
            q_b,
            q_h,
            q_n,
            q_d,
            CHUNK,
        )
        row, _, _, target = _measured(m, scale, query, eps, lowest)
        row *= (factor * factor)[:, None]
        n = start + i
        at = batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + n.to(tl.int64) * out_n
        at = out + at[:, None] + e[None, :] * out_d
        inside = (n < tokens)[:, None] & (e < value_dim)[None, :]
        tl.store(at, row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_gradient(acc, power, m, scale, query, length, along, g):
    """The sum of the gradients of M, acc 2^power, with that of one more: (q^ g - u o g) / |M|."""
    left = g / length
    right = left * along
    own = _exponent(left)
    left, right = left * _two(-own), right * _two(-own)
    own = tl.where(left == 0, NOTHING, own - scale)
    now = tl.maximum(power, own)
    left, right = left * _two(own - now), right * _two(own - now)
    one = query[:, :, None] * left[:, None, :] - m * right[:, None, :]
    return acc * _two(power - now)[:, None, :] + one, now


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
    lines,
    chunks,
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
    GROUP: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A chunk's sum of the gradients of M_i; the scales of M_i; sums over columns of u g, the gradient of q^,
    and of o grad, with out = gamma^2 o and g = gamma^2 grad."""
    line, batch, head, start = _place(lines, chunks, heads, CHUNK, GROUP)
    block = tl.program_id(1)
    d, e = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.zeros([GROUP], tl.float32) + _gamma(gamma, head, heads, GAMMA)
    partial += block.to(tl.int64) * lines * CHUNK * D
    m = tl.load(_matrices(before, line, d, e, D, E))
    scale = tl.load(scales + line[:, None] * E + e[None, :])
    target = scale
    acc, power = tl.zeros([GROUP, D, COLUMNS], tl.float32), tl.full([GROUP, COLUMNS], NOTHING, tl.int32)
    weighed = tl.zeros([GROUP, COLUMNS], tl.float32)
    for i in range(tl.minimum(CHUNK, tokens)):
        key, exponent, values = _pair(
            k,
            v,
            mask,
            exponents,
            line,
            batch,
            head,
            start,
            i,
            d,
            e,
            tokens,
            dim,
            value_dim,
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
            CHUNK,
            MASKED,
        )
        m, scale = _add(m, scale, target, key, exponent, values)
        query = _query(
            q,
            near,
            inverse,
            line,
            batch,
            head,
            start,
            i,
            d,
            tokens,
            dim,
            q_b,
            q_h,
            q_n,
            q_d,
            CHUNK,
        )
        row, length, along, target = _measured(m, scale, query, eps, lowest)
        at, n = line * CHUNK + i, start + i
        tl.store(token_scales + at[:, None] * E + e[None, :], scale)
        g = _token(grad, batch, head, n, e, n < tokens, value_dim, g_b, g_h, g_n, g_d)
        weighed += row * g
        g *= (factor * factor)[:, None]
        tl.store(partial + at[:, None] * D + d[None, :], tl.sum(m * (g / length)[:, None, :], 2))
        acc, power = _add_gradient(acc, power, m, scale, query, length, along, g)
    tl.store(_matrices(total, line, d, e, D, E), acc)
    tl.store(total_scales + line[:, None] * E + e[None, :], power)
    tl.store(gamma_grad + line * tl.num_programs(1) + block, tl.sum(weighed, 1))


@triton.jit
def _scan_backward(
    total,
    scales,
    programs,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What lies after each chunk, in place of the chunk's own sum."""
    program = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    d, e = tl.arange(0, D), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = program < programs
    acc, power = tl.zeros([GROUP, D, COLUMNS], tl.float32), tl.full([GROUP, COLUMNS], NOTHING, tl.int32)
    for back in range(chunks):
        line = program * chunks + chunks - 1 - back
        matrix = _matrices(total, line, d, e, D, E)
        place = scales + line[:, None] * E + e[None, :]
        one = tl.load(matrix, mask=inside[:, None, None], other=0.0)
        own = tl.load(place, mask=inside[:, None], other=0)
        tl.store(matrix, acc, mask=inside[:, None, None])
        tl.store(place, power, mask=inside[:, None])
        now = tl.maximum(power, own)
        acc = acc * _two(power - now)[:, None, :] + one * _two(own - now)[:, None, :]
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
    total,
    total_scales,
    partial,
    dv,
    lines,
    chunks,
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
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    GAMMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """With G_j = sum_{i >= j} dM_i: dv_j = k_j G_j, and sums over columns of dk_j = G_j v_j.

    Tokens from the last to the first; M_i is summed again from the first token of its span, for to subtract
    the later tokens from M would lose what is far smaller than they are.
    """
    line, batch, head, start = _place(lines, chunks, heads, CHUNK, GROUP)
    block = tl.program_id(1)
    d, e = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.zeros([GROUP], tl.float32) + _gamma(gamma, head, heads, GAMMA)
    partial += block.to(tl.int64) * lines * CHUNK * D
    acc = tl.load(_matrices(total, line, d, e, D, E))
    power = tl.load(total_scales + line[:, None] * E + e[None, :])
    count = tl.minimum(CHUNK, tokens)
    spans = tl.cdiv(count, SPAN)
    for span in range(spans):
        first = (spans - 1 - span) * SPAN
        opening = tl.load(_matrices(before, line, d, e, D, E))
        opening_scale = tl.load(scales + line[:, None] * E + e[None, :])
        for i in range(first):
            key, exponent, values = _pair(
                k,
                v,
                mask,
                exponents,
                line,
                batch,
                head,
                start,
                i,
                d,
                e,
                tokens,
                dim,
                value_dim,
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
                CHUNK,
                MASKED,
            )
            target = tl.load(token_scales + (line * CHUNK + i)[:, None] * E + e[None, :])
            opening, opening_scale = _add(opening, opening_scale, target, key, exponent, values)
        last = tl.minimum(first + SPAN, count)
        for back in range(last - first):
            j = last - 1 - back
            m, scale = opening, opening_scale
            for i in range(first, j + 1):
                key, exponent, values = _pair(
                    k,
                    v,
                    mask,
                    exponents,
                    line,
                    batch,
                    head,
                    start,
                    i,
                    d,
                    e,
                    tokens,
                    dim,
                    value_dim,
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
                    CHUNK,
                    MASKED,
                )
                target = tl.load(token_scales + (line * CHUNK + i)[:, None] * E + e[None, :])
                m, scale = _add(m, scale, target, key, exponent, values)
            query = _query(
                q,
                near,
                inverse,
                line,
                batch,
                head,
                start,
                j,
                d,
                tokens,
                dim,
                q_b,
                q_h,
                q_n,
                q_d,
                CHUNK,
            )
            _, length, along, _ = _measured(m, scale, query, eps, lowest)
            n = start + j
            g = _token(grad, batch, head, n, e, n < tokens, value_dim, g_b, g_h, g_n, g_d)
            g *= (factor * factor)[:, None]
            acc, power = _add_gradient(acc, power, m, scale, query, length, along, g)
            key, exponent, values = _pair(
                k,
                v,
                mask,
                exponents,
                line,
                batch,
                head,
                start,
                j,
                d,
                e,
                tokens,
                dim,
                value_dim,
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
                CHUNK,
                MASKED,
            )
            own = _exponent(values)
            values = values * _two(-own) * _two(own + power)
            at = partial + (line * CHUNK + j)[:, None] * D + d[None, :]
            tl.store(at, tl.sum(acc * values[:, None, :], 2))
            row = tl.sum(acc * key[:, :, None], 1) * _two(exponent[:, None] + power)
            at = batch.to(tl.int64) * dv_b + head.to(tl.int64) * dv_h + n.to(tl.int64) * dv_n
            at = dv + at[:, None] + e[None, :] * dv_d
            inside = (n < tokens)[:, None] & (e < value_dim)[None, :]
            tl.store(at, row.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _added(
    partial,
    x,
    out,
    blocks,
    tokens,
    padded,
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
        at = (program + block * tl.num_programs(1)).to(tl.int64) * padded + n
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
    """What the walks of one call share, and the states before the chunks."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float):
        batch, heads, tokens, dim = q.shape
        self.wide, self.wide_value = shared.padded(dim), shared.padded(v.shape[3])
        self.chunk = max(CHUNK, CHUNK * self.wide_value // 64)
        self.chunks, self.programs = triton.cdiv(tokens, self.chunk), batch * heads
        self.lines, self.padded = self.programs * self.chunks, self.chunks * self.chunk
        self.eps = max(eps, 2.0**-126)
        self.lowest = math.frexp(self.eps)[1] - 1
        self.sizes = self.lines, self.chunks, tokens, heads, dim, v.shape[3]
        self.pointer, masked = shared.pointer(mask, q), mask is not None
        self.key_strides = *k.stride(), *v.stride(), *shared.mask_strides(mask)
        self.exponents = q.new_empty(self.programs, self.padded, dtype=torch.int32)
        self.near, self.inverse = q.new_empty(2, self.programs, self.padded, dtype=torch.float32)
        _rows[triton.cdiv(self.padded, shared.BLOCK), self.programs](
            q,
            k,
            self.pointer,
            self.exponents,
            self.near,
            self.inverse,
            tokens,
            self.padded,
            heads,
            dim,
            self.eps,
            *q.stride(),
            *k.stride(),
            *shared.mask_strides(mask),
            D=self.wide,
            BLOCK=shared.BLOCK,
            MASKED=masked,
        )
        self.state, self.scales = self.empty()
        grid, words = self.launch(COLUMNS, self.lines)
        _sums[grid](
            k,
            v,
            self.pointer,
            self.exponents,
            self.state,
            self.scales,
            *self.sizes,
            self.lowest,
            *self.key_strides,
            CHUNK=self.chunk,
            SHIFT=SUM_SHIFT,
            MASKED=masked,
            **words,
        )
        grid, words = self.launch(COLUMNS, self.programs)
        _scan_forward[grid](self.state, self.scales, self.programs, self.chunks, self.lowest, **words)

    def empty(self) -> tuple[Tensor, Tensor]:
        """A matrix for each chunk, and the exponents of its columns."""
        scales = self.exponents.new_empty(self.lines, self.wide_value)
        return self.near.new_empty(self.lines, self.wide, self.wide_value), scales

    def launch(self, columns: int, over: int) -> tuple[tuple[int, int], dict]:
        """The grid, `over` (chunks or heads) and blocks of columns, and the constants."""
        columns = min(columns, self.wide_value)
        group = max(1, ENTRIES // (self.wide * columns))
        words = {
            "D": self.wide,
            "E": self.wide_value,
            "COLUMNS": columns,
            "GROUP": group,
            "num_warps": max(1, self.wide * columns // 2**10),
        }
        return (triton.cdiv(over, group), self.wide_value // columns), words


@torch.library.custom_op("sansmax::xnorm_causal", mutates_args=())
def _xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    out, walk = shared.tokens_first(q, v.shape[3]), _Walk(q, k, v, mask, eps)
    grid, words = walk.launch(COLUMNS, walk.lines)
    _output[grid](
        q,
        k,
        v,
        q if gamma is None else gamma,
        walk.pointer,
        walk.exponents,
        walk.near,
        walk.inverse,
        walk.state,
        walk.scales,
        out,
        *walk.sizes,
        walk.eps,
        walk.lowest,
        *q.stride(),
        *walk.key_strides,
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
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and (B, H) the sum of grad out without gamma, for each image."""
    walk = _Walk(q, k, v, mask, eps)
    grid, words = walk.launch(COLUMNS_BACKWARD, walk.lines)
    words |= {"CHUNK": walk.chunk, "GAMMA": gamma is not None, "MASKED": mask is not None}
    blocks = grid[1]
    total, total_scales = walk.empty()
    token_scales = walk.exponents.new_empty(walk.lines, walk.chunk, walk.wide_value)
    partial = walk.near.new_empty(blocks, walk.programs, walk.padded, walk.wide)
    gamma_grad = walk.near.new_empty(*q.shape[:2], walk.chunks * blocks)
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    tensors = (
        grad,
        q,
        k,
        v,
        q if gamma is None else gamma,
        walk.pointer,
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
    sizes = *walk.sizes, walk.eps, walk.lowest
    strides = *grad.stride(), *q.stride(), *walk.key_strides
    _backward_totals[grid](*tensors, gamma_grad, *sizes, *strides, **words)
    _sum_blocks(partial, q, dq, walk.eps, True)
    scan_grid, scan_words = walk.launch(COLUMNS, walk.programs)
    _scan_backward[scan_grid](total, total_scales, walk.programs, walk.chunks, **scan_words)
    _gradients[grid](*tensors, dv, *sizes, *strides, *dv.stride(), SPAN=SPAN, **words)
    _sum_blocks(partial, k, dk, walk.eps, False)
    return dq, dk, dv, gamma_grad.sum(-1)


def _sum_blocks(partial: Tensor, x: Tensor, out: Tensor, eps: float, unit: bool) -> None:
    blocks, programs, padded, wide = partial.shape
    _added[triton.cdiv(x.shape[2], shared.BLOCK), programs](
        partial,
        x,
        out,
        blocks,
        x.shape[2],
        padded,
        x.shape[1],
        x.shape[3],
        eps,
        *x.stride(),
        *out.stride(),
        D=wide,
        BLOCK=shared.BLOCK,
        UNIT=unit,
        num_warps=shared.warps(wide),
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

"""Triton kernels of the mechanisms whose exponents are k_uc + w_tu: causal AFT-simple, AFT-full, AFT-local.

Tiles of BLOCK queries and BLOCK keys around the diagonal, as far as w reaches, and for what lies beyond,
where w is 0, sums over all earlier and all later blocks, which `scan` prepares.

A tile is two matrix products, exp(w - top) with exp(k - top) v and with exp(k - top), the tops over the keys
of the tile. The largest term of a row is then at least exp(-span), if span is how far all keys of a channel
lie apart, or all biases of a row. Where both spans exceed LIMIT the tile is summed key by key, an exponent
per (query, key, channel). A sum is held with its own exponent as a triple: num exp(top), den exp(top); tops
are numbers like any other, and only differences from them are rounded.

The backward pass knows the mean r, top and 1 / den, so that

    p_tuc = exp(k_uc + w_tu - top_tc)            g = grad sigmoid(q) / den
    dv_u = sum_t p_tu g_t     dk_u = sum_t p_tu g_t (v_u - r_t)     dw_tu = sum_bc p_tu g_t (v_u - r_t)

and beyond the reach of w its sums over the queries are triples with the exponents -top. p <= 1; a query
without keys has 1 / den = 0 and the exponent -LOWEST.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel, and a reduction in it as a tuple.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import BLOCK, dot, kept

# exp(40) times a gradient leaves float32 room, and exp(-40) leaves 47 nats below it for small terms.
LIMIT = tl.constexpr(40.0)
# In place of -inf for a maximum over nothing: differences are no NaN, and three times as much is a number.
LOWEST = tl.constexpr(-1.0e38)
INFINITY = tl.constexpr(float("inf"))
# Channels of a tile.
CHANNELS = 64


@triton.jit
def tile(pointer, batch, n, c, inside, channels, stride_b, stride_n, stride_c):
    """A block of tokens (n, c) in float32, zeros outside."""
    at = pointer + batch * stride_b + n.to(tl.int64)[:, None] * stride_n
    at += c.to(tl.int64)[None, :] * stride_c
    return tl.load(at, mask=inside[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    """a @ b of float32: rounded to bfloat16, to float16's ten bits (its range is too small), or not."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a, b, input_precision="tf32" if DTYPE == tl.float16 else "ieee")  # noqa: SIM300


@triton.jit
def small(exponent):
    """exp, finite also where the sum that it multiplies is empty."""
    return tl.exp(tl.minimum(exponent, 80.0))


@triton.jit
def powers(x, top, keep):
    """exp(x - top), where top is the largest of what is kept, and 0 elsewhere."""
    return tl.where(keep[:, None], tl.exp(tl.minimum(x - top[None, :], 0.0)), 0.0)


@triton.jit
def gate_of(q):
    """sigmoid(q); below -88 it is no normal float32."""
    return tl.sigmoid(tl.maximum(q, -88.0))


@triton.jit
def common(y, keep):
    """What the kept values of a block share: the one nearest to 0 if all have one sign, else 0.

    Products that are rounded take the values from there, or it would drown their differences. No |y - common|
    is above |y|, which the mean could not promise where one value is large and weighs nothing.
    """
    low = tl.min(tl.where(keep[:, None], y, -LOWEST), 0)
    high = tl.max(tl.where(keep[:, None], y, LOWEST), 0)
    return tl.where(low > high, 0.0, tl.maximum(low, 0.0) + tl.minimum(high, 0.0))


@triton.jit
def joined(a, b, top, other_a, other_b, other_top):
    """The sum of two triples."""
    high = tl.maximum(top, other_top)
    by, other_by = tl.exp(top - high), tl.exp(other_top - high)
    return a * by + other_a * other_by, b * by + other_b * other_by, high


@triton.jit
def keys_of(
    k,
    v,
    mask,
    batch,
    u,
    c,
    tokens,
    channels,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
):
    """Keys, values, which of them are kept, the largest key of each channel, and how far keys lie apart."""
    keep = kept(mask, batch, u, u < tokens, mask_b, mask_n, MASKED)
    x = tile(k, batch, u, c, keep, channels, k_b, k_n, k_c)
    y = tile(v, batch, u, c, keep, channels, v_b, v_n, v_c)
    top = tl.max(tl.where(keep[:, None], x, LOWEST), 0)
    low = tl.min(tl.where(keep[:, None], x, -LOWEST), 0)
    return x, y, keep, top, tl.max(top - low, 0)


@triton.jit
def biases_of(w, t, u, keep, tokens, window, w_t, w_u, CAUSAL: tl.constexpr, BIASED: tl.constexpr):
    """(t, u), -inf for keys left out; the largest of each row; how far those of kept keys lie apart."""
    bias = tl.zeros([t.shape[0], u.shape[0]], tl.float32)
    if BIASED:
        distance = t[:, None] - u[None, :]
        inside = (t < tokens)[:, None] & keep[None, :] & (distance < window) & (distance > -window)
        at = w + t.to(tl.int64)[:, None] * w_t + u.to(tl.int64)[None, :] * w_u
        bias += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    seen = keep[None, :] & (t[:, None] >= u[None, :] if CAUSAL else t[:, None] >= 0)
    bias = tl.where(seen, bias, -INFINITY)
    top = tl.maximum(tl.max(bias, 1), LOWEST)
    low = tl.min(tl.where(keep[None, :], bias, INFINITY), 1)
    return bias, top, tl.max(top - low, 0)


@triton.jit
def nearby(block, blocks, window, BLOCK: tl.constexpr):
    """The first block that `block` shares a tile with, and the end of them, future ones included."""
    reach = tl.maximum(window - 1, 0)
    first = tl.maximum(block * BLOCK - reach, 0) // BLOCK
    return first, tl.minimum((block * BLOCK + BLOCK - 1 + reach) // BLOCK + 1, blocks)


@triton.jit
def state(sums, side, batch, block, blocks, c, channels):
    """What `scan` left for `block`: (first sum, second sum, top)."""
    step = tl.num_programs(2).to(tl.int64) * (blocks + 1) * channels
    at = sums + side * 3 * step + (batch * (blocks + 1) + block) * channels + c
    inside = c < channels
    a, b = tl.load(at, mask=inside, other=0.0), tl.load(at + step, mask=inside, other=0.0)
    return a, b, tl.load(at + 2 * step, mask=inside, other=LOWEST)


@triton.jit
def totals(
    k,
    v,
    mask,
    first,
    second,
    tops,
    tokens,
    per_part,
    channels,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Triples (num, den, top) of the parts of the tokens, (B, parts, C) each."""
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    num, den = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    top = tl.full([C], LOWEST, tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        u = start + tl.arange(0, BLOCK)
        x, y, keep, high, _ = keys_of(
            k, v, mask, batch, u, c, stop, channels, k_b, k_n, k_c, v_b, v_n, v_c, mask_b, mask_n, MASKED
        )
        high = tl.maximum(top, high)
        weight = powers(x, high, keep)
        by = tl.exp(top - high)
        num = num * by + tl.sum(weight * y, 0)
        den = den * by + tl.sum(weight, 0)
        top = high
    at = (batch * tl.num_programs(0) + part) * channels + c
    tl.store(first + at, num, mask=c < channels)
    tl.store(second + at, den, mask=c < channels)
    tl.store(tops + at, top, mask=c < channels)


@triton.jit
def query_totals(
    grads,
    means,
    tops,
    first,
    second,
    high,
    tokens,
    channels,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
):
    """Triples (sum g, sum g r) of blocks of queries."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    t = block * BLOCK + tl.arange(0, BLOCK)
    g, r, top = queries_of(grads, means, tops, batch, t, c, tokens, channels)
    largest = -tl.min(top, 0)
    weight = tl.exp(-top - largest[None, :]) * g
    at = (batch * tl.num_programs(0) + block) * channels + c
    tl.store(first + at, tl.sum(weight, 0), mask=c < channels)
    tl.store(second + at, tl.sum(weight * r, 0), mask=c < channels)
    tl.store(high + at, largest, mask=c < channels)


@triton.jit
def queries_of(grads, means, tops, batch, t, c, tokens, channels):
    """g, r and top of a block of queries; outside as without keys."""
    at = (batch * tokens + t.to(tl.int64)[:, None]) * channels + c[None, :]
    inside = (t < tokens)[:, None] & (c < channels)[None, :]
    g, r = tl.load(grads + at, mask=inside, other=0.0), tl.load(means + at, mask=inside, other=0.0)
    return g, r, tl.load(tops + at, mask=inside, other=-LOWEST)


@triton.jit
def scan(first, second, tops, sums, blocks, channels, C: tl.constexpr):
    """sums (2, 3, B, blocks + 1, C): of the blocks before each, and of the blocks from each on."""
    batch, side = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * C + tl.arange(0, C)
    a, b = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    top = tl.full([C], LOWEST, tl.float32)
    for i in range(blocks):
        put(sums, side, batch, i if side == 0 else blocks - i, blocks, c, channels, a, b, top)
        at = (batch * blocks + (i if side == 0 else blocks - 1 - i)) * channels + c
        other_a = tl.load(first + at, mask=c < channels, other=0.0)
        other_b = tl.load(second + at, mask=c < channels, other=0.0)
        other_top = tl.load(tops + at, mask=c < channels, other=LOWEST)
        a, b, top = joined(a, b, top, other_a, other_b, other_top)
    put(sums, side, batch, blocks if side == 0 else 0, blocks, c, channels, a, b, top)


@triton.jit
def put(sums, side, batch, block, blocks, c, channels, a, b, top):
    """Where `state` finds it."""
    step = tl.num_programs(0).to(tl.int64) * (blocks + 1) * channels
    at = sums + side * 3 * step + (batch * (blocks + 1) + block) * channels + c
    tl.store(at, a, mask=c < channels)
    tl.store(at + step, b, mask=c < channels)
    tl.store(at + 2 * step, top, mask=c < channels)


@triton.jit
def forward(
    q,
    k,
    v,
    w,
    mask,
    sums,
    out,
    means,
    tops,
    inverse,
    tokens,
    channels,
    window,
    q_b,
    q_n,
    q_c,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    w_t,
    w_u,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIASED: tl.constexpr,
    BEYOND: tl.constexpr,
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A block of queries."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    t = block * BLOCK + tl.arange(0, BLOCK)
    num, den = tl.zeros([BLOCK, C], tl.float32), tl.zeros([BLOCK, C], tl.float32)
    top = tl.full([BLOCK, C], LOWEST, tl.float32)
    start, stop = nearby(block, blocks, window, BLOCK)
    if CAUSAL:
        stop = block + 1
    if BEYOND:
        a, b, high = state(sums, 0, batch, start, blocks, c, channels)
        if not CAUSAL:
            other_a, other_b, other_high = state(sums, 1, batch, stop, blocks, c, channels)
            a, b, high = joined(a, b, high, other_a, other_b, other_high)
        num, den, top = num + a[None, :], den + b[None, :], tl.maximum(top, high[None, :])
    for other in range(start, stop):
        u = other * BLOCK + tl.arange(0, BLOCK)
        x, y, keep, k_top, k_span = keys_of(
            k, v, mask, batch, u, c, tokens, channels, k_b, k_n, k_c, v_b, v_n, v_c, mask_b, mask_n, MASKED
        )
        bias, w_top, w_span = biases_of(w, t, u, keep, tokens, window, w_t, w_u, CAUSAL, BIASED)
        if tl.minimum(k_span, w_span) <= LIMIT:
            weight = powers(x, k_top, keep)
            raised = tl.maximum(top, k_top[None, :] + w_top[:, None])
            by, here = tl.exp(top - raised), small((k_top[None, :] - raised) + w_top[:, None])
            rows = tl.exp(bias - w_top[:, None])
            if k.dtype.element_ty == tl.float32:
                # Not rounded; the form below would spill 8 KiB (compute capability 9.0).
                num = num * by + product(rows, weight * y, tl.float32) * here
                den = den * by + product(rows, weight, tl.float32) * here
            else:
                middle = common(y, keep)[None, :]
                more = product(rows, weight, k.dtype.element_ty) * here
                num, den = num * by + middle * more, den * by + more
                num += product(rows, weight * (y - middle), k.dtype.element_ty) * here
            top = raised
        else:
            for i in range(BLOCK):
                u1 = other * BLOCK + i + tl.arange(0, 1)
                x1, y1, keep1, _, _ = keys_of(
                    k,
                    v,
                    mask,
                    batch,
                    u1,
                    c,
                    tokens,
                    channels,
                    k_b,
                    k_n,
                    k_c,
                    v_b,
                    v_n,
                    v_c,
                    mask_b,
                    mask_n,
                    MASKED,
                )
                bias1, _, _ = biases_of(w, t, u1, keep1, tokens, window, w_t, w_u, CAUSAL, BIASED)
                top1 = tl.maximum(top, x1 + bias1)
                by1, here1 = tl.exp(top - top1), tl.exp((x1 - top1) + bias1)
                num, den, top = num * by1 + here1 * y1, den * by1 + here1, top1
    empty = den == 0
    den = tl.where(empty, 1.0, den)
    r = num / den
    inside = t < tokens
    gate = gate_of(tile(q, batch, t, c, inside, channels, q_b, q_n, q_c))
    at = (batch * tokens + t.to(tl.int64)[:, None]) * channels + c[None, :]
    here = inside[:, None] & (c < channels)[None, :]
    tl.store(out + at, (gate * r).to(out.dtype.element_ty), mask=here)
    if KEPT:
        tl.store(means + at, r, mask=here)
        tl.store(tops + at, tl.where(empty, -LOWEST, top), mask=here)
        tl.store(inverse + at, tl.where(empty, 0.0, 1 / den), mask=here)


@triton.jit
def gate_backward(
    grad,
    q,
    means,
    inverse,
    grads,
    dq,
    tokens,
    channels,
    grad_b,
    grad_n,
    grad_c,
    q_b,
    q_n,
    q_c,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
):
    """g = grad sigmoid(q) / den in float32, and dq."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    t = block * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    gate = gate_of(tile(q, batch, t, c, inside, channels, q_b, q_n, q_c))
    g = gate * tile(grad, batch, t, c, inside, channels, grad_b, grad_n, grad_c)
    at = (batch * tokens + t.to(tl.int64)[:, None]) * channels + c[None, :]
    here = inside[:, None] & (c < channels)[None, :]
    r, by = tl.load(means + at, mask=here, other=0.0), tl.load(inverse + at, mask=here, other=0.0)
    tl.store(grads + at, g * by, mask=here)
    tl.store(dq + at, (g * r * (1 - gate)).to(dq.dtype.element_ty), mask=here)


@triton.jit
def shifted(log_weight, g, r, middle):
    """p g and p g (r - middle), where exp(log_weight) is p or its factor."""
    a = small(log_weight) * g
    return a, a * (r - middle)


@triton.jit
def backward(
    k,
    v,
    w,
    mask,
    sums,
    grads,
    means,
    tops,
    dk,
    dv,
    tokens,
    channels,
    window,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    w_t,
    w_u,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIASED: tl.constexpr,
    BEYOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv of a block of keys; v_u - r_t is taken as (v_u - middle) - (r_t - middle)."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    u = block * BLOCK + tl.arange(0, BLOCK)
    x, y, keep, k_top, k_span = keys_of(
        k, v, mask, batch, u, c, tokens, channels, k_b, k_n, k_c, v_b, v_n, v_c, mask_b, mask_n, MASKED
    )
    weight = powers(x, k_top, keep)
    middle = common(y, keep)
    y -= middle[None, :]
    start, stop = nearby(block, blocks, window, BLOCK)
    if CAUSAL:
        start = block
    to_k, to_v = tl.zeros([BLOCK, C], tl.float32), tl.zeros([BLOCK, C], tl.float32)
    if BEYOND:
        far, far_r, high = state(sums, 1, batch, stop, blocks, c, channels)
        if not CAUSAL:
            other_a, other_b, other_high = state(sums, 0, batch, start, blocks, c, channels)
            far, far_r, high = joined(far, far_r, high, other_a, other_b, other_high)
        p = tl.where(keep[:, None], small(x + high[None, :]), 0.0)
        to_v += p * far[None, :]
        to_k += p * (y * far[None, :] - (far_r - middle * far)[None, :])
    for other in range(start, stop):
        t = other * BLOCK + tl.arange(0, BLOCK)
        bias, w_top, w_span = biases_of(w, t, u, keep, tokens, window, w_t, w_u, CAUSAL, BIASED)
        if tl.minimum(k_span, w_span) <= LIMIT:
            g, r, top = queries_of(grads, means, tops, batch, t, c, tokens, channels)
            a, b = shifted((k_top[None, :] - top) + w_top[:, None], g, r, middle[None, :])
            rows = tl.trans(tl.exp(bias - w_top[:, None]))
            a = product(rows, a, k.dtype.element_ty)
            b = product(rows, b, k.dtype.element_ty)
            to_v += weight * a
            to_k += weight * (y * a - b)
        else:
            for i in range(BLOCK):
                t1 = other * BLOCK + i + tl.arange(0, 1)
                bias1, _, _ = biases_of(w, t1, u, keep, tokens, window, w_t, w_u, CAUSAL, BIASED)
                g1, r1, top1 = queries_of(grads, means, tops, batch, t1, c, tokens, channels)
                a1, b1 = shifted((x - top1) + tl.trans(bias1), g1, r1, middle[None, :])
                to_v += a1
                to_k += y * a1 - b1
    at = (batch * tokens + u.to(tl.int64)[:, None]) * channels + c[None, :]
    here = (u < tokens)[:, None] & (c < channels)[None, :]
    tl.store(dk + at, to_k.to(dk.dtype.element_ty), mask=here)
    tl.store(dv + at, to_v.to(dv.dtype.element_ty), mask=here)


@triton.jit
def bias_backward(
    k,
    v,
    w,
    mask,
    grads,
    means,
    tops,
    dw,
    tokens,
    channels,
    window,
    batches,
    per_part,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    w_t,
    w_u,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dw (parts of the batch, T, T) of a tile: the second axis of programs counts the tiles of a row."""
    block, part = tl.program_id(0), tl.program_id(2)
    blocks = tl.num_programs(0)
    start, stop = nearby(block, blocks, window, BLOCK)
    if CAUSAL:
        stop = block + 1
    other = start + tl.program_id(1)
    t, u = block * BLOCK + tl.arange(0, BLOCK), other * BLOCK + tl.arange(0, BLOCK)
    to_w = tl.zeros([BLOCK, BLOCK], tl.float32)
    # Past the last tile of the row nothing is left to do.
    last = tl.where(other < stop, tl.minimum((part + 1) * per_part, batches), 0)
    for image in range(last - part * per_part):
        batch = part.to(tl.int64) * per_part + image
        for first in range(0, channels, C):
            c = first + tl.arange(0, C)
            x, y, keep, k_top, k_span = keys_of(
                k,
                v,
                mask,
                batch,
                u,
                c,
                tokens,
                channels,
                k_b,
                k_n,
                k_c,
                v_b,
                v_n,
                v_c,
                mask_b,
                mask_n,
                MASKED,
            )
            bias, w_top, w_span = biases_of(w, t, u, keep, tokens, window, w_t, w_u, CAUSAL, True)
            g, r, top = queries_of(grads, means, tops, batch, t, c, tokens, channels)
            if tl.minimum(k_span, w_span) <= LIMIT:
                middle = common(y, keep)
                weight = powers(x, k_top, keep)
                a, b = shifted((k_top[None, :] - top) + w_top[:, None], g, r, middle[None, :])
                s = product(a, tl.trans(weight * (y - middle[None, :])), k.dtype.element_ty)
                s -= product(b, tl.trans(weight), k.dtype.element_ty)
                to_w += tl.exp(bias - w_top[:, None]) * s
            else:
                for i in range(BLOCK):
                    u1 = other * BLOCK + i + tl.arange(0, 1)
                    x1, y1, keep1, _, _ = keys_of(
                        k,
                        v,
                        mask,
                        batch,
                        u1,
                        c,
                        tokens,
                        channels,
                        k_b,
                        k_n,
                        k_c,
                        v_b,
                        v_n,
                        v_c,
                        mask_b,
                        mask_n,
                        MASKED,
                    )
                    bias1, _, _ = biases_of(w, t, u1, keep1, tokens, window, w_t, w_u, CAUSAL, True)
                    _, b1 = shifted((x1 - top) + bias1, g, r, y1)
                    to_w -= tl.where((u == u1)[None, :], tl.sum(b1, 1)[:, None], 0.0)
    distance = t[:, None] - u[None, :]
    end = tl.minimum(tokens, stop * BLOCK)
    here = (t < tokens)[:, None] & (u < end)[None, :] & (distance < window) & (distance > -window)
    at = dw + (part.to(tl.int64) * tokens + t[:, None]) * tokens + u[None, :]
    tl.store(at, to_w, mask=here)


def wide(channels: int) -> int:
    return min(CHANNELS, shared.padded(channels))


def grid(x: Tensor) -> tuple[int, int, int]:
    """Programs for blocks of tokens, blocks of channels and images of x (B, T, C)."""
    batch, tokens, channels = x.shape
    return triton.cdiv(tokens, BLOCK), triton.cdiv(channels, wide(channels)), batch


def part_totals(k: Tensor, v: Tensor, mask: Tensor | None, count: int, per_part: int) -> Tensor:
    """The triples (3, B, count, C) of parts of the tokens."""
    batch, tokens, channels = k.shape
    sums = k.new_empty(3, batch, count, channels, dtype=torch.float32)
    totals[count, grid(k)[1], batch](
        k,
        v,
        shared.pointer(mask, k),
        *sums,
        tokens,
        per_part,
        channels,
        *k.stride(),
        *v.stride(),
        *shared.mask_strides(mask),
        BLOCK=BLOCK,
        C=wide(channels),
        MASKED=mask is not None,
    )
    return sums


def running(sums: Tensor) -> Tensor:
    """`scan` of the triples (3, B, blocks, C)."""
    _, batch, blocks, channels = sums.shape
    width = wide(channels)
    result = sums.new_empty(2, 3, batch, blocks + 1, channels)
    scan[batch, triton.cdiv(channels, width), 2](*sums, result, blocks, channels, C=width)
    return result


def average(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, mask: Tensor | None, window: int, causal: bool
) -> Tensor:
    """The gated means with the bias w (T, T) where |t - u| < window, else 0; without w the window is 0."""
    inputs = (q, k, v) if w is None else (q, k, v, w)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _average(q, k, v, w, mask, window, causal, keep)[0]


@torch.library.custom_op("sansmax::aft_average", mutates_args=())
def _average(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    mask: Tensor | None,
    window: int,
    causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output; (3, B, T, C): means, exponents and 1 / denominators, nothing unless `keep`."""
    tokens, channels = q.shape[1:]
    beyond = window < tokens
    sums = running(part_totals(k, v, mask, grid(k)[0], BLOCK)) if beyond else q
    out, rows = _empty(q, keep)
    forward[grid(q)](
        q,
        k,
        v,
        q if w is None else w,
        shared.pointer(mask, q),
        sums,
        out,
        *(rows if keep else (out,) * 3),
        tokens,
        channels,
        min(window, tokens),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *((0, 0) if w is None else w.stride()),
        *shared.mask_strides(mask),
        BLOCK=BLOCK,
        C=wide(channels),
        CAUSAL=causal,
        BIASED=w is not None,
        BEYOND=beyond,
        MASKED=mask is not None,
        KEPT=keep,
        num_warps=8,
    )
    return out, rows


@_average.register_fake
def _(q, k, v, w, mask, window, causal, keep):
    return _empty(q, keep)


def _empty(q: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((3, *q.shape) if keep else (3, 0, 0, 0), dtype=torch.float32)


@torch.library.custom_op("sansmax::aft_average_backward", mutates_args=())
def _average_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    window: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and w, nothing for a missing w."""
    batch, tokens, channels = q.shape
    blocks = grid(q)[0]
    options = {"BLOCK": BLOCK, "C": wide(channels)}
    means, tops, inverse = rows
    grads, dq, dk, dv = (
        torch.empty_like(means),
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    )
    gate_backward[grid(q)](
        grad, q, means, inverse, grads, dq, tokens, channels, *grad.stride(), *q.stride(), **options
    )
    beyond, window = window < tokens, min(window, tokens)
    sums = q
    if beyond:
        sums = q.new_empty(3, batch, blocks, channels, dtype=torch.float32)
        query_totals[grid(q)](grads, means, tops, *sums, tokens, channels, **options)
        sums = running(sums)
    strides = (
        *k.stride(),
        *v.stride(),
        *((0, 0) if w is None else w.stride()),
        *shared.mask_strides(mask),
    )
    options |= {"CAUSAL": causal, "MASKED": mask is not None, "num_warps": 8}
    inputs = k, v, q if w is None else w, shared.pointer(mask, q)
    backward[grid(q)](
        *inputs,
        sums,
        grads,
        means,
        tops,
        dk,
        dv,
        tokens,
        channels,
        window,
        *strides,
        BIASED=w is not None,
        BEYOND=beyond,
        **options,
    )
    if w is None:
        return dq, dk, dv, q.new_empty(0)
    tiles = triton.cdiv(max(window - 1, 0), BLOCK)
    tiles = min(blocks, tiles + 1 if causal else 2 * tiles + 1)
    # Images are split as blocks of tokens are elsewhere.
    count, per_part = shared.parts(batch * shared.BLOCK, blocks * tiles, q.device)
    dw = torch.zeros(count, tokens, tokens, dtype=torch.float32, device=q.device)
    bias_backward[blocks, tiles, count](
        *inputs,
        grads,
        means,
        tops,
        dw,
        tokens,
        channels,
        window,
        batch,
        per_part // shared.BLOCK,
        *strides,
        **options,
    )
    return dq, dk, dv, dw.sum(0).to(w.dtype)


@_average_backward.register_fake
def _(grad, q, k, v, w, mask, rows, window, causal):
    dw = q.new_empty(0) if w is None else w.new_empty(q.shape[1], q.shape[1])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dw


def _keep(ctx, inputs, output):
    q, k, v, w, mask, ctx.window, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, w, mask, output[1])


def _differentiate(ctx, grad, _):
    q, k, v, w, mask, rows = ctx.saved_tensors
    dq, dk, dv, dw = _average_backward(grad, q, k, v, w, mask, rows, ctx.window, ctx.causal)
    return dq, dk, dv, None if w is None else dw, None, None, None, None


_average.register_autograd(_differentiate, setup_context=_keep)

"""AFT-simple on a GPU: triples of parts of the tokens, and one pass over the queries that adds them up.

The causal form is AFT-local with the window 0. q, k, v are read as they lie.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _triton as shared
from ..._triton import BLOCK, kept
from .. import _triton as tiles
from .._triton import LOWEST, gate_of, joined, powers, tile


def aft_simple(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return tiles.average(q, k, v, None, mask, 0, True) if causal else _aft_simple(q, k, v, mask)[0]


@triton.jit
def _forward(
    q,
    nums,
    dens,
    tops,
    out,
    means,
    high,
    inverse,
    tokens,
    channels,
    parts,
    q_b,
    q_n,
    q_c,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
):
    """sigmoid(q) num / den; the first block keeps the mean, the exponent and 1 / den."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    within = c < channels
    num, den = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    top = tl.full([C], LOWEST, tl.float32)
    for part in range(parts):
        at = (batch * parts + part) * channels + c
        other_num = tl.load(nums + at, mask=within, other=0.0)
        other_den = tl.load(dens + at, mask=within, other=0.0)
        other_top = tl.load(tops + at, mask=within, other=LOWEST)
        num, den, top = joined(num, den, top, other_num, other_den, other_top)
    empty = den == 0
    den = tl.where(empty, 1.0, den)
    r = num / den
    t = block * BLOCK + tl.arange(0, BLOCK)
    gate = gate_of(tile(q, batch, t, c, t < tokens, channels, q_b, q_n, q_c))
    at = (batch * tokens + t.to(tl.int64)[:, None]) * channels + c[None, :]
    inside = (t < tokens)[:, None] & within[None, :]
    tl.store(out + at, (gate * r[None, :]).to(out.dtype.element_ty), mask=inside)
    if block == 0:
        row = batch * channels + c
        tl.store(means + row, r, mask=within)
        tl.store(high + row, top, mask=within)
        tl.store(inverse + row, tl.where(empty, 0.0, 1 / den), mask=within)


@triton.jit
def _queries_backward(
    grad,
    q,
    means,
    sums,
    dq,
    tokens,
    channels,
    per_part,
    grad_b,
    grad_n,
    grad_c,
    q_b,
    q_n,
    q_c,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
):
    """dq, and a part of sum_t grad_t sigmoid(q_t)."""
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    r = tl.load(means + batch * channels + c, mask=c < channels, other=0.0)
    acc = tl.zeros([BLOCK, C], tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        t = start + tl.arange(0, BLOCK)
        gate = gate_of(tile(q, batch, t, c, t < stop, channels, q_b, q_n, q_c))
        g = gate * tile(grad, batch, t, c, t < stop, channels, grad_b, grad_n, grad_c)
        acc += g
        at = (batch * tokens + t.to(tl.int64)[:, None]) * channels + c[None, :]
        inside = (t < stop)[:, None] & (c < channels)[None, :]
        tl.store(dq + at, (g * r[None, :] * (1 - gate)).to(dq.dtype.element_ty), mask=inside)
    at = (batch * tl.num_programs(0) + part) * channels + c
    tl.store(sums + at, tl.sum(acc, 0), mask=c < channels)


@triton.jit
def _keys_backward(
    k,
    v,
    mask,
    means,
    tops,
    inverse,
    sums,
    dk,
    dv,
    tokens,
    channels,
    parts,
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
    """dv_u = p_u sum_t g_t, dk_u = dv_u (v_u - r)."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    within = c < channels
    total = tl.zeros([C], tl.float32)
    for part in range(parts):
        total += tl.load(sums + (batch * parts + part) * channels + c, mask=within, other=0.0)
    at = batch * channels + c
    r = tl.load(means + at, mask=within, other=0.0)
    top, by = tl.load(tops + at, mask=within, other=0.0), tl.load(inverse + at, mask=within, other=0.0)
    u = block * BLOCK + tl.arange(0, BLOCK)
    keep = kept(mask, batch, u, u < tokens, mask_b, mask_n, MASKED)
    x = tile(k, batch, u, c, keep, channels, k_b, k_n, k_c)
    y = tile(v, batch, u, c, keep, channels, v_b, v_n, v_c)
    to_v = powers(x, top, keep) * (by * total)[None, :]
    at = (batch * tokens + u.to(tl.int64)[:, None]) * channels + c[None, :]
    inside = (u < tokens)[:, None] & within[None, :]
    tl.store(dv + at, to_v.to(dv.dtype.element_ty), mask=inside)
    tl.store(dk + at, (to_v * (y - r[None, :])).to(dk.dtype.element_ty), mask=inside)


def _parts(x: Tensor) -> tuple[int, int]:
    batch, tokens, _ = x.shape
    return shared.parts(tokens, batch * tiles.grid(x)[1], x.device)


@torch.library.custom_op("sansmax::aft_simple", mutates_args=())
def _aft_simple(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output; (3, B, C): means, the largest keys, 1 / denominators."""
    count, per_part = _parts(k)
    sums = tiles.part_totals(k, v, mask, count, per_part)
    out, rows = _empty(q)
    _forward[tiles.grid(q)](
        q,
        *sums,
        out,
        *rows,
        q.shape[1],
        q.shape[2],
        count,
        *q.stride(),
        BLOCK=BLOCK,
        C=tiles.wide(q.shape[2]),
    )
    return out, rows


@_aft_simple.register_fake
def _(q, k, v, mask):
    return _empty(q)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(3, q.shape[0], q.shape[2], dtype=torch.float32)


@torch.library.custom_op("sansmax::aft_simple_backward", mutates_args=())
def _aft_simple_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = q.shape
    count, per_part = _parts(q)
    sums = q.new_empty(batch, count, channels, dtype=torch.float32)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    options = {"BLOCK": BLOCK, "C": tiles.wide(channels)}
    _queries_backward[count, tiles.grid(q)[1], batch](
        grad, q, rows[0], sums, dq, tokens, channels, per_part, *grad.stride(), *q.stride(), **options
    )
    _keys_backward[tiles.grid(k)](
        k,
        v,
        shared.pointer(mask, k),
        *rows,
        sums,
        dk,
        dv,
        tokens,
        channels,
        count,
        *k.stride(),
        *v.stride(),
        *shared.mask_strides(mask),
        MASKED=mask is not None,
        **options,
    )
    return dq, dk, dv


@_aft_simple_backward.register_fake
def _(grad, q, k, v, mask, rows):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad, _):
    return *_aft_simple_backward(grad, *ctx.saved_tensors), None


_aft_simple.register_autograd(_differentiate, setup_context=_keep)

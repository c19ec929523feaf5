"""AFT-conv: weighted averages of the values with a learned bias for near tokens, then a gate.

    y_t = sigmoid(q_t) * sum_u exp(k_u + w(u - t)) v_u / sum_u exp(k_u + w(u - t))      per head, element-wise

Zhai et al., "An Attention Free Transformer" (arXiv 2105.14103), Eq. 2 and Eq. 6, Sec. 3.2. The bias w
depends on the relative position alone, one kernel per head, and is 0 (weight 1, not 0) outside the kernel:
every token sees every token. All channels of a head share ONE key. Axes: B batch, T tokens, H heads, C = H
* dh channels, channel = head * dh + j. The kernel is read as PyTorch's convolutions read it, not flipped:
w[i] is for u - t = i - s // 2.

The paper uses the centred form on images. The causal form (one-dimensional) sums u <= t, its last tap is
the current token. Prefix tokens (a class token) lie outside the grid: bias 0 to and from everything.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import _check
from ..._backend import choose, no_autocast
from .. import _triple
from .._triple import Triple
from . import fused

__all__ = [
    "AFTConvState",
    "aft_conv",
    "aft_conv_init_state",
    "aft_conv_step",
    "example",
    "flops",
    "reparameterize",
]

# Of the kernels.
KERNEL_FORMS = ("", "causal")
# Channels of a head that the kernels serve.
WIDEST = 128

# Weights (B, H, rows, T) that the reference holds at a time.
_REFERENCE_ENTRIES = 2**22


def aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    prefix_tokens: int = 0,
    bounded: bool = False,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """AFT-conv (see the module for the equation).

    Args:
        q, v: (B, T, C), k: (B, T, H) with C divisible by H; any floating dtype, any strides.
        w: (H, s) over a sequence, or (H, s, s) over a grid; centred, s odd (causal: any s). Any dtype.
        grid: (rows, columns) of the tokens behind the prefix, row by row; for a two-dimensional w only.
        causal: token t sums the tokens 0..t; for a one-dimensional w without prefix tokens.
        mask: (B, T) bool, True = keep. A masked token enters no sum; where a sum is empty the output is 0.
        prefix_tokens: how many tokens at the start lie outside the sequence or grid.
        bounded: the caller knows that fused.within(w), which a graph cannot ask; it then has that form alone.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, T, C) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, an even centred kernel or backend do not fit.
    """
    kernel, cells = _checked(q, k, v, w, grid, causal, mask, prefix_tokens)
    limits = (("head width", q.shape[2] // k.shape[2], WIDEST),)
    name, _ = choose("aft.conv", backend, q, limits, explain=explain)
    q = _check.finite_queries(mask, q)
    if name == "triton":
        from . import triton

        return triton.aft_conv(q, k, v, kernel, mask, cells, causal, prefix_tokens)
    if mask is not None:
        k, v = k.masked_fill(~mask[..., None], -torch.inf), v.masked_fill(~mask[..., None], 0)
    if name == "reference":
        return reference(q, k, v, kernel, cells, causal, prefix_tokens)
    return fused.aft_conv(q, k, v, kernel, cells, causal, prefix_tokens, bounded)


def _checked(q, k, v, w, grid, causal, mask, prefix) -> tuple[Tensor, tuple[int, int]]:
    """The kernel as (H, rows, columns) and the grid that it moves over."""
    op = "aft_conv"
    _check.floating(op, q=q, k=k, v=v)
    _check.floating(op, w=w)
    _check.floating(op, q=q, w=w.to(q.dtype))
    _check.shape(op, "q", q, ("B", "T", "C"), "flatten the heads into channels, channel = head * dh + j")
    b, tokens, channels = q.shape
    _check.shape(op, "k", k, (b, tokens, "H"), "AFT-conv has one key per head, not per channel")
    _check.shape(op, "v", v, (b, tokens, channels), "v has the shape of q")
    _check.key_mask(op, mask, b, tokens, q)
    heads = k.shape[2]
    if channels % heads:
        raise ValueError(
            f"{op}: the channels of q must be divisible by the heads of k, got {channels} and {heads}; "
            f"change one of them"
        )
    sizes = ("s",) if w.ndim == 2 else ("s", "s")
    _check.shape(op, "w", w, (heads, *sizes), "one kernel (s) or (s, s) for each head of k")
    if not causal and any(size % 2 == 0 for size in w.shape[1:]):
        raise ValueError(
            f"{op}: a centred kernel must have odd sizes, got {tuple(w.shape[1:])}; pad w with zeros"
        )
    if prefix < 0 or prefix >= tokens or (causal and prefix):
        wanted = "0 when causal=True" if causal else f"at least 0 and less than T = {tokens}"
        raise ValueError(
            f"{op}: prefix_tokens must be {wanted}, got {prefix}; split the tokens off otherwise"
        )
    if w.ndim == 2:
        if grid is not None:
            raise ValueError(
                f"{op}: grid must be None for a kernel w of shape (H, s), got {grid}; "
                f"leave it out or pass w of shape (H, s, s)"
            )
        return w.unsqueeze(1), (1, tokens - prefix)
    if causal:
        raise ValueError(
            f"{op}: causal=True is not defined for a two-dimensional kernel, got w {tuple(w.shape)}; "
            f"use w of shape (H, s) over the sequence"
        )
    if grid is None or len(grid) != 2 or grid[0] < 1 or prefix + grid[0] * grid[1] != tokens:
        raise ValueError(
            f"{op}: grid must be (rows, columns) with prefix_tokens + rows * columns = T = {tokens}, "
            f"got {grid} and {prefix} prefix tokens; pass the patch grid"
        )
    return w, (grid[0], grid[1])


def reference(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], causal: bool, prefix: int
) -> Tensor:
    """The literal equation with one maximum per (t, head); masked keys hold -inf, masked values 0."""
    dtype = q.dtype
    q, k, v, w = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, w))
    keys, values = k.mT[:, :, None], v.unflatten(-1, (k.shape[2], -1)).transpose(1, 2)
    rows = max(1, _REFERENCE_ENTRIES // keys.expand(-1, -1, 1, -1).numel())
    parts = torch.arange(q.shape[1], device=q.device).split(rows)
    # Parts are recomputed in the backward pass, which would otherwise hold all T x T weights.
    recomputed = partial(checkpoint, _average, use_reentrant=False, preserve_rng_state=False)
    average = recomputed if len(parts) > 1 else _average
    with no_autocast(q):
        averages = [average(keys, values, w, part, grid, causal, prefix) for part in parts]
        return (q.sigmoid() * torch.cat(averages, 2).transpose(1, 2).flatten(2)).to(dtype)


def _average(k, v, w, queries, grid, causal, prefix) -> Tensor:
    exponents = k + _bias(w, queries, v.shape[2], grid, causal, prefix)  # (B, H, queries, T)
    if causal:
        future = torch.arange(v.shape[2], device=v.device) > queries[:, None]
        exponents = exponents.masked_fill(future, -torch.inf)
    top = exponents.detach().amax(-1, keepdim=True)
    weights = (exponents - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total.masked_fill(total == 0, 1)


def _bias(w, queries, tokens, grid, causal, prefix) -> Tensor:
    """(H, queries, T): w where key minus query lies inside the kernel, else 0."""
    sizes = w.new_tensor(w.shape[1:], dtype=torch.long)
    current = sizes - 1 if causal else sizes // 2
    position = torch.arange(tokens, device=w.device) - prefix
    position = torch.stack([position.div(grid[1], rounding_mode="floor"), position % grid[1]], -1)
    tap = position - position[queries, None] + current  # (queries, T, 2)
    inside = ((tap >= 0) & (tap < sizes)).all(-1)
    inside &= (position[:, 0] >= 0) & (position[queries, 0] >= 0)[:, None]
    row, column = (tap * inside[..., None]).unbind(-1)
    return w[:, row, column].masked_fill(~inside, 0)


def reparameterize(w: Tensor, gamma: Tensor, beta: Tensor, *, unbiased: bool = False) -> Tensor:
    """gamma * (w - mean(w)) / std(w) + beta per head (arXiv 2105.14103, Sec. 3.2).

    There is no eps, neither in the paper nor here: a kernel whose deviation is only rounding counts as
    constant and gives beta. With gamma = beta = 0, as the paper starts, the bias is 0.

    Args:
        w: (H, s) or (H, s, s); gamma, beta: (H,); floating, same dtype and device.
        unbiased: the variance is divided by n - 1 (torch.std's default), not by n; the paper does not say.

    Returns:
        The kernel in the shape and dtype of w; half precision is computed in float32.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    op = "reparameterize"
    _check.floating(op, w=w, gamma=gamma, beta=beta)
    sizes = ("s",) if w.ndim == 2 else ("s", "s")
    _check.shape(op, "w", w, ("H", *sizes))
    _check.shape(op, "gamma", gamma, (w.shape[0],))
    _check.shape(op, "beta", beta, (w.shape[0],))
    raw, gamma, beta = (t.to(torch.promote_types(w.dtype, torch.float32)) for t in (w, gamma, beta))
    raw = raw.flatten(1)
    centred = raw - raw.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(raw.shape[1] - unbiased, 1)
    rounding = 4 * torch.finfo(raw.dtype).eps * raw.detach().abs().amax(1, keepdim=True)
    constant = variance.detach().sqrt() <= rounding
    unit = centred.masked_fill(constant, 0) * variance.masked_fill(constant, 1).rsqrt()
    return (gamma[:, None] * unit + beta[:, None]).view_as(w).to(w.dtype)


def flops(batch: int, tokens: int, channels: int, heads: int, taps: int) -> int:
    """Two for each multiply-add of the depth-wise convolution over numerators and denominators."""
    return 2 * batch * tokens * (channels + heads) * taps


class AFTConvState(NamedTuple):
    """What the causal form remembers, constant in the number of tokens; s is the kernel size."""

    past: Triple  # (B, H, dh), (B, H, 1), (B, H, 1): the tokens that have left the kernel
    k: Tensor  # (B, H, s - 1, 1), the last keys, oldest first; -inf before the first token
    v: Tensor  # (B, H, s - 1, dh)


def aft_conv_init_state(
    batch: int, channels: int, heads: int, kernel_size: int, *, dtype=torch.float32, device=None
) -> AFTConvState:
    """The state before the first token; use float64 for float64 tokens, else float32."""
    if channels % heads:
        raise ValueError(
            f"aft_conv_init_state: channels must be divisible by heads, got {channels} and {heads}; "
            f"change one of them"
        )
    like, width, ring = torch.empty(0, dtype=dtype, device=device), channels // heads, kernel_size - 1
    past = _triple.empty((batch, heads, width), (batch, heads, 1), like)
    return AFTConvState(
        past, like.new_full((batch, heads, ring, 1), -torch.inf), like.new_zeros(batch, heads, ring, width)
    )


def aft_conv_step(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, state: AFTConvState
) -> tuple[Tensor, AFTConvState]:
    """One token of causal AFT-conv: q, v (B, C), k (B, H), w (H, s) -> out (B, C) and the next state."""
    op, fits = "aft_conv_step", "the state was made for these sizes"
    _check.floating(op, q=q, k=k, v=v)
    _check.floating(op, w=w)
    b, heads, ring, width = state.v.shape
    for name, tensor, size in (("q", q, heads * width), ("k", k, heads), ("v", v, heads * width)):
        _check.shape(op, name, tensor, (b, size), fits)
    _check.shape(op, "w", w, (heads, ring + 1), fits)
    dtype = q.dtype
    q, k, v, w = (t.to(state.k.dtype) for t in (q, k, v, w))
    keys = torch.cat([state.k, k[..., None, None]], 2)
    values = torch.cat([state.v, v.unflatten(1, (heads, 1, width))], 2)
    window = _triple.total(_triple.tokens(keys + w[..., None], values))
    average = _triple.finish(_triple.combine(state.past, window.map(lambda part: part.squeeze(2))))
    left = _triple.combine(state.past, _triple.tokens(keys[:, :, 0], values[:, :, 0]))
    return (q.sigmoid() * average.flatten(1)).to(dtype), AFTConvState(left, keys[:, :, 1:], values[:, :, 1:])


def example(batch=2, heads=3, tokens=11, dim=5, *, grid=None, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors, C = heads * dim and 3 taps per axis, and keyword arguments.

    Tokens that the grid does not take are prefix tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    kernel = (3,) if grid is None else (3, 3)
    options = {} if grid is None else {"grid": grid, "prefix_tokens": tokens - grid[0] * grid[1]}
    channels = (batch, tokens, heads * dim)
    sizes = (channels, (batch, tokens, heads), channels, (heads, *kernel))
    tensors = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return tuple(t.to(device, dtype) for t in tensors), options

"""AFT-full: attention with one exponent per channel and a learned bias per pair of positions.

    out_t = sigmoid(q_t) * sum_u exp(k_u + w_tu) v_u / sum_u exp(k_u + w_tu)          per batch and CHANNEL

w_tu (query position t, key position u) is one scalar for all channels and the whole batch; as factors (u, v)
it is w = u v^T. There is no head axis and no scale. w_tu = -inf leaves the key out; a row without keys gives
0. The causal form sums over u <= t. Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103),
equation 2; no official code exists. A number added to all keys of a channel, or to a row of w, changes
nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import _check
from ..._backend import Limits, choose, no_autocast
from .. import _triple
from . import fused

__all__ = ["AFTFullState", "aft_full", "aft_full_init_state", "aft_full_step", "example", "flops"]

# Of the kernels.
KERNEL_FORMS = ("", "causal")
# Up to here the kernels form u v^T, 256 MiB.
LONGEST = 8192

# Entries of one (B, rows, T, C) temporary of the reference.
ENTRIES = 1 << 21


def aft_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | tuple[Tensor, Tensor],
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """AFT-full (see the module for the equation).

    Args:
        q, k, v: (B, T, C), any floating dtype, any strides.
        w: (T_max, T_max), or a pair of factors (T_max, R) whose product u v^T it is; T <= T_max tokens use
            its first T rows and columns. Its dtype may differ from that of q: float32 beside half precision.
        causal: sum over the keys u <= t.
        mask: (B, T) bool over the keys, True = keep. The outputs of masked tokens are still computed.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, T, C) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or backend do not fit, or T > T_max.
    """
    factors = check("aft_full", q, k, v, w, mask)
    name, _ = choose("aft.full", backend, q, limits(factors, q.shape[1]), explain=explain)
    if name == "triton":
        from . import triton

        return triton.aft_full(_check.finite_queries(mask, q), k, v, factors, mask, causal)
    q, k, v = hidden(mask, q, k, v)
    body = reference if name == "reference" else fused.aft_full
    return body(q, k, v, factors, causal)


def check(
    op: str, q: Tensor, k: Tensor, v: Tensor, w: Tensor | tuple[Tensor, Tensor], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """w as a tuple of one matrix or two factors, if everything fits."""
    _check.floating(op, q=q, k=k, v=v)
    _check.shape(op, "q", q, ("B", "T", "C"), "AFT has no head axis: flatten the heads into the channels")
    _check.shape(op, "k", k, tuple(q.shape), "q, k and v have one shape")
    _check.shape(op, "v", v, tuple(q.shape), "q, k and v have one shape")
    _check.key_mask(op, mask, q.shape[0], q.shape[1], q)
    factors = bias(op, w, q)
    if q.shape[1] > factors[0].shape[0]:
        raise ValueError(
            f"{op}: w must cover all T = {q.shape[1]} tokens, got one for T_max = {factors[0].shape[0]}; "
            f"make w larger or resample it, or give fewer tokens"
        )
    return factors


def limits(w: tuple[Tensor, ...], tokens: int) -> Limits:
    return (("length of a bias in factors", tokens, LONGEST),) if len(w) == 2 else ()


def bias(op: str, w: Tensor | tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """(w,) or the factors (u, v), checked."""
    if isinstance(w, Tensor):
        parts = {"w": w}
    elif isinstance(w, tuple | list) and len(w) == 2:
        parts = {"w[0]": w[0], "w[1]": w[1]}
    else:
        raise TypeError(
            f"{op}: w must be a tensor (T_max, T_max) or a pair of factors (T_max, R), got "
            f"{type(w).__name__}; use aft_simple for no bias"
        )
    for name, part in parts.items():
        _check.floating(op, **{name: part})
        _check.floating(op, q=like, **{name: part.new_empty(0, dtype=like.dtype)})  # the device alone
    if len(parts) == 1:
        (dense,) = parts.values()
        _check.shape(op, "w", dense, ("T_max", "T_max"), "w has one bias per pair of positions")
        _check.shape(op, "w", dense, (dense.shape[0],) * 2, "w has one bias per pair of positions")
    else:
        left, right = parts.values()
        _check.shape(op, "w[0]", left, ("T_max", "R"), "a factor has one row per position")
        _check.shape(op, "w[1]", right, tuple(left.shape), "both factors have one shape")
    return tuple(parts.values())


def hidden(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked tokens: keys -inf and values 0, so that whatever they hold reaches no output and no gradient."""
    if mask is None:
        return q, k, v
    drop = ~mask[:, :, None]
    return _check.finite_queries(mask, q), k.masked_fill(drop, -torch.inf), v.masked_fill(drop, 0)


def reference(q: Tensor, k: Tensor, v: Tensor, w: tuple[Tensor, ...], causal: bool) -> Tensor:
    """The literal equation, some queries at a time; masked keys are -inf and hold zeros in v."""
    dtype, tokens = q.dtype, k.shape[1]
    q, k, v, *factors = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, *w))
    with no_autocast(q):
        bias = (factors[0] if len(factors) == 1 else factors[0] @ factors[1].mT)[:tokens, :tokens]
        if causal:
            bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -torch.inf)
        parts = [
            checkpoint(_weighted_mean, k, v, rows, use_reentrant=False, preserve_rng_state=False)
            for rows in bias.split(max(1, ENTRIES // k.numel()))
        ]
        return (torch.sigmoid(q) * torch.cat(parts, 1)).to(dtype)


def _weighted_mean(k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    exponents = k[:, None] + rows[:, :, None]  # (B, rows, T, C)
    top = exponents.detach().amax(2, keepdim=True)
    weights = (exponents - top.masked_fill(top == -torch.inf, 0)).exp()
    den = weights.sum(2)
    return (weights * v[:, None]).sum(2) / den.masked_fill(den == 0, 1)


def flops(batch: int, tokens: int, channels: int, factor_dim: int = 0) -> int:
    """Two for each multiply-add of numerator and denominator, and of u v^T (once for the whole batch)."""
    return tokens * tokens * (4 * batch * channels + 2 * factor_dim)


class AFTFullState(NamedTuple):
    """What the causal form remembers: every key and value of the past; w needs them all again."""

    k: Tensor  # (B, t, C)
    v: Tensor  # (B, t, C)

    @property
    def position(self) -> int:
        """The position of the next token."""
        return self.k.shape[1]


def aft_full_init_state(batch: int, channels: int, *, dtype=torch.float32, device=None) -> AFTFullState:
    """The state before the first token; float64 for float64 tokens, else float32, or half to save memory."""
    nothing = torch.zeros(batch, 0, channels, dtype=dtype, device=device)
    return AFTFullState(nothing, nothing)


def aft_full_step(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | tuple[Tensor, Tensor], state: AFTFullState
) -> tuple[Tensor, AFTFullState]:
    """One token of causal AFT-full: q, k, v (B, C) -> out (B, C) and the next state."""
    factors = check_step("aft_full_step", q, k, v, w, state.k, state.position)
    state = AFTFullState(*remember(state.k, state.v, k, v))
    with no_autocast(q):
        return gated(q, _triple.finish(recent(state.k, state.v, factors, state.position))), state


def check_step(
    op: str, q: Tensor, k: Tensor, v: Tensor, w: Tensor | tuple[Tensor, Tensor], past: Tensor, index: int
) -> tuple[Tensor, ...]:
    """w as a tuple, if one token fits the keys (B, t, C) that the state holds."""
    _check.floating(op, q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        sizes = (past.shape[0], past.shape[2])
        _check.shape(op, name, tensor, sizes, "a step takes (B, C), and the state was made for these sizes")
    factors = bias(op, w, q)
    covered = factors[0].shape[0]
    if index >= covered:
        raise ValueError(
            f"{op}: w must cover the token at position {index}, got one for T_max = {covered} tokens; "
            f"make w larger or resample it, or start from a new state"
        )
    return factors


def remember(past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (B, t, C) with one more token, in the dtype of the past."""
    k, v = (torch.cat([past, t[:, None].to(past.dtype)], 1) for past, t in ((past_k, k), (past_v, v)))
    return k, v


def recent(k: Tensor, v: Tensor, w: tuple[Tensor, ...], end: int | Tensor) -> _triple.Triple:
    """The sums (B, C) of query end - 1 over the keys (B, n, C) that end there, biases included.

    Keys of -inf may stand before the first token.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    if isinstance(end, Tensor) or k.shape[1] > end:
        past: Any = (torch.arange(-k.shape[1], 0, device=k.device) + end).clamp(min=0)
        row = w[0][past[-1:]][0].to(dtype)
    else:
        past = slice(end - k.shape[1], end)
        row = w[0][end - 1].to(dtype)
    row = row[past] if len(w) == 1 else w[1][past].to(dtype) @ row
    # k - base + w keeps the digits that k + w loses where all keys are large.
    base = k.detach().amax(1)
    exponents = (k - base[:, None]) + row[:, None]
    top = base + exponents.detach().amax(1)
    weights = _triple.weight(exponents, (top - base)[:, None])
    return _triple.Triple((weights * v).sum(1), weights.sum(1), top)


def gated(q: Tensor, context: Tensor) -> Tensor:
    return (torch.sigmoid(q.to(context.dtype)) * context).to(q.dtype)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, tokens, heads * dim, generator=generator, dtype=torch.float64)
    w = torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)
    return tuple(t.to(device, dtype) for t in (q, k, v, w)), {}

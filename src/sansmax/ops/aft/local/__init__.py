"""AFT-local: AFT-full whose bias is 0 outside a window; every position stays connected.

    out_t = sigmoid(q_t) * sum_u exp(k_u + w'_tu) v_u / sum_u exp(k_u + w'_tu)        per batch and CHANNEL
    w'_tu = w_tu where |t - u| < s, else 0                              (weight exp(0) = 1, not excluded)

The window s covers 2 s - 1 positions: 0 is AFT-simple, 1 the diagonal alone, s >= T is AFT-full. The causal
form sums over u <= t. Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103), equation 4; no
official code exists. With -inf outside (the paper's ablation) it is aft_full with that bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _check
from ..._backend import choose, no_autocast
from ..._eager import exporting
from .. import _triple, full
from . import fused

__all__ = ["AFTLocalState", "aft_local", "aft_local_init_state", "aft_local_step", "example", "flops"]

# Of the kernels.
KERNEL_FORMS = ("", "causal")


def aft_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | tuple[Tensor, Tensor],
    window: int,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """AFT-local (see the module for the equation).

    Args:
        q, k, v: (B, T, C), any floating dtype, any strides.
        w: (T_max, T_max), or a pair of factors (T_max, R) whose product u v^T it is, of which only the band
            |t - u| < window is computed; T <= T_max tokens use its first T rows and columns. Its dtype may
            differ
            from that of q: float32 beside half precision.
        window: s >= 0.
        causal: sum over the keys u <= t.
        mask: (B, T) bool over the keys, True = keep. The outputs of masked tokens are still computed.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, T, C) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, window or backend do not fit, or T > T_max.
    """
    factors = full.check("aft_local", q, k, v, w, mask)
    _check_window("aft_local", window)
    name, _ = choose("aft.local", backend, q, full.limits(factors, q.shape[1]), explain=explain)
    if name == "triton":
        from . import triton

        return triton.aft_local(_check.finite_queries(mask, q), k, v, factors, mask, window, causal)
    q, k, v = full.hidden(mask, q, k, v)
    body = reference if name == "reference" else fused.aft_local
    return body(q, k, v, factors, window, causal)


def _check_window(op: str, window: int) -> None:
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"{op}: window must be an int >= 0, got {window!r}; 0 is AFT-simple")


def reference(q: Tensor, k: Tensor, v: Tensor, w: tuple[Tensor, ...], window: int, causal: bool) -> Tensor:
    """The literal equation: AFT-full with the bias w'; masked keys are -inf and hold zeros in v."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    w = tuple(t.to(dtype) for t in w)
    with no_autocast(q):
        dense = w[0] if len(w) == 1 else w[0] @ w[1].mT
    at = torch.arange(dense.shape[0], device=dense.device)
    dense = dense.masked_fill((at[:, None] - at).abs() >= window, 0)
    return full.reference(q, k, v, (dense,), causal)


def flops(
    batch: int, tokens: int, channels: int, window: int, factor_dim: int = 0, causal: bool = False
) -> int:
    """Two for each multiply-add of numerator and denominator inside the window, and of the band of u v^T."""
    return fused.pairs(tokens, window, causal) * (4 * batch * channels + 2 * factor_dim)


class AFTLocalState(NamedTuple):
    """What the causal form remembers: sums over the distant past, and the last window - 1 keys and values."""

    num: Tensor  # (B, C); the sums are num exp(top) and den exp(top), none where top = -inf
    den: Tensor  # (B, C)
    top: Tensor  # (B, C)
    k: Tensor  # (B, at most window - 1, C); -inf stands for no token
    v: Tensor  # (B, at most window - 1, C)
    position: Tensor  # int64 without axes, on the CPU: the position of the next token


def aft_local_init_state(batch: int, channels: int, *, dtype=torch.float32, device=None) -> AFTLocalState:
    """The state before the first token; `dtype` is of the kept keys and values, sums are at least float32."""
    nothing = torch.zeros(batch, 0, channels, dtype=dtype, device=device)
    wide = nothing.to(torch.promote_types(dtype, torch.float32))
    sums = _triple.empty((batch, channels), (batch, channels), wide)
    return AFTLocalState(*sums, nothing, nothing, torch.zeros((), dtype=torch.int64))


def aft_local_step(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | tuple[Tensor, Tensor], window: int, state: AFTLocalState
) -> tuple[Tensor, AFTLocalState]:
    """One token of causal AFT-local: q, k, v (B, C) -> out (B, C) and the next state.

    A token leaves the window `window` steps after its own and joins the sums.
    """
    # A graph has no number to check.
    index = 0 if exporting() else int(state.position)
    factors = full.check_step("aft_local_step", q, k, v, w, state.k, index)
    _check_window("aft_local_step", window)
    keys, values = full.remember(state.k, state.v, k, v)
    with no_autocast(q):
        wide = state.num.dtype
        if window == 0:
            near = _triple.tokens(keys[:, -1].to(wide), values[:, -1].to(wide))
        else:
            end = state.position + 1 if exporting() else index + 1
            near = full.recent(keys, values, factors, end)
        far = _triple.Triple(state.num, state.den, state.top)
        out = full.gated(q, _triple.finish(_triple.combine(far, near)))
        if keys.shape[1] >= max(window, 1):
            far = _triple.combine(far, _triple.tokens(keys[:, 0].to(wide), values[:, 0].to(wide)))
            keys, values = keys[:, 1:], values[:, 1:]
    return out, AFTLocalState(*far, keys, values, state.position + 1)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments."""
    tensors, _ = full.example(batch, heads, tokens, dim, dtype=dtype, device=device, seed=seed)
    return tensors, {"window": 4}

"""AFT-simple: one weighted average of the values over time for each channel, then a gate.

    y_t = sigmoid(q_t) * sum_u exp(k_u) v_u / sum_u exp(k_u)        element-wise per channel c

Zhai et al., "An Attention Free Transformer" (arXiv 2105.14103), Eq. 5: Eq. 2 without a position bias. The
sum runs over all u and is then the same for every t; causal, over u <= t ("limiting the range of the
summation", footnote 2). There are no heads: every channel has a key of its own. Axes: B batch, T tokens, C
channels.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import _check
from ..._backend import choose, no_autocast
from .. import _triple
from .._triple import Triple
from . import fused

__all__ = ["aft_simple", "aft_simple_init_state", "aft_simple_step", "example", "flops"]

# Of the kernels.
KERNEL_FORMS = ("", "causal")

# Weights (B, rows, T, C) that the causal reference holds at a time.
_REFERENCE_ENTRIES = 2**22


def aft_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """AFT-simple (see the module for the equation).

    Args:
        q, k, v: (B, T, C), any floating dtype, any strides.
        causal: token t sums the tokens 0..t.
        mask: (B, T) bool, True = keep. A masked token enters no sum; where a sum is empty the output is 0.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, T, C) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or backend do not fit.
    """
    _check.floating("aft_simple", q=q, k=k, v=v)
    _check.shape(
        "aft_simple", "q", q, ("B", "T", "C"), "AFT has no head axis; flatten the heads into channels"
    )
    for name, tensor in (("k", k), ("v", v)):
        _check.shape("aft_simple", name, tensor, tuple(q.shape), "every query has one key and one value")
    _check.key_mask("aft_simple", mask, q.shape[0], q.shape[1], q)
    name, _ = choose("aft.simple", backend, q, explain=explain)
    if name == "triton":
        from . import triton

        return triton.aft_simple(q, k, v, mask, causal)
    if mask is not None:
        k, v = k.masked_fill(~mask[..., None], -torch.inf), v.masked_fill(~mask[..., None], 0)
    return (reference if name == "reference" else fused.aft_simple)(q, k, v, causal)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The literal equation with one maximum per (t, c); masked keys hold -inf, masked values 0."""
    dtype = q.dtype
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    b, tokens, channels = q.shape
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
    # Without causality all rows are equal.
    visible = visible.tril() if causal else visible[:1]
    rows = max(1, _REFERENCE_ENTRIES // (b * tokens * channels))
    parts = visible.split(rows)
    # Parts are recomputed in the backward pass, which would otherwise hold all T x T x C weights.
    recomputed = partial(checkpoint, _average, use_reentrant=False, preserve_rng_state=False)
    average = recomputed if len(parts) > 1 else _average
    with no_autocast(q):
        return (q.sigmoid() * torch.cat([average(k, v, part) for part in parts], 1)).to(dtype)


def _average(k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    exponents = k[:, None].masked_fill(~visible[..., None], -torch.inf)  # (B, rows, T, C)
    top = exponents.detach().amax(2, keepdim=True)
    weights = (exponents - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(2)
    return (weights * v[:, None]).sum(2) / total.masked_fill(total == 0, 1)


def flops(batch: int, tokens: int, channels: int) -> int:
    """Two for each multiply-add: numerator, denominator and gate; no matrix product."""
    return 2 * 3 * batch * tokens * channels


def aft_simple_init_state(batch: int, channels: int, *, dtype=torch.float32, device=None) -> Triple:
    """The state before the first token, 3 (B, C) sums; use float64 for float64 tokens, else float32."""
    shape = (batch, channels)
    return _triple.empty(shape, shape, torch.empty(0, dtype=dtype, device=device))


def aft_simple_step(q: Tensor, k: Tensor, v: Tensor, state: Triple) -> tuple[Tensor, Triple]:
    """One token of causal AFT-simple: q, k, v (B, C) -> out (B, C) and the next state."""
    _check.floating("aft_simple_step", q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.shape(
            "aft_simple_step", name, tensor, tuple(state.num.shape), "the state was made for these sizes"
        )
    dtype = q.dtype
    q, k, v = (t.to(state.num.dtype) for t in (q, k, v))
    state = _triple.combine(state, _triple.tokens(k, v))
    return (q.sigmoid() * _triple.finish(state)).to(dtype), state


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors, C = heads * dim, and keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch, tokens, heads * dim, generator=generator, dtype=torch.float64)
    return tuple(qkv.to(device, dtype).unbind(0)), {}

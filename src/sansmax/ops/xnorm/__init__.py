"""XNorm: l2 norms in place of softmax (UFO-ViT, X-ViT; without gamma: BiNorm of ViBid).

    M = k^T v                                            (D x E), before anything else
    M^ = gamma M / max(||M||_2 over axis -2, eps)        each COLUMN of M, one per value channel
    q^ = gamma q / max(||q||_2 over axis -1, eps)        each query
    out = q^ M^

Song and Lee, "X-ViT: High Performance Linear Vision Transformer without Softmax", 2022 (arXiv 2205.13805);
Song, UFO-ViT (arXiv 2109.14382); "ViBid", UAI 2023 (PMLR 216), equation 5 and Algorithm 1. No official code
exists. gamma is one number per head and scales both factors: a head scales with gamma^2 and |out| <= gamma^2.
Positive scales of any query, any value channel or all keys change nothing; neither does repeating the tokens.

The causal form takes M over the prefix: M_i = sum_{j<=i} k_j v_j^T. It is not in the papers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._backend import choose, no_autocast
from . import fused
from ._norms import row_scale, unit_columns

__all__ = ["XNormState", "example", "flops", "xnorm", "xnorm_init_state", "xnorm_step"]

KERNEL_FORMS = ("", "causal")
# Of the kernels: a matrix of a head is held whole.
WIDEST = 128


def xnorm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-12,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """XNorm attention (see the module for the equation).

    Args:
        q, k, v: (B, H, N, D), (B, H, M, D), (B, H, M, E), any floating dtype, any strides. M != N is allowed.
        gamma: (H,), or None for BiNorm (gamma = 1).
        mask: (B, M) bool over the keys, True = keep.
        causal: M over the prefix; needs N == M.
        eps: floor of the l2 norms. A query, value channel or key set of zeros gives 0.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, H, N, E) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or backend do not fit.
    """
    _check.qkv("xnorm", q, k, v, mask, causal)
    _check.eps("xnorm", eps)
    if gamma is not None:
        _check.floating("xnorm", q=q, gamma=gamma.to(q.dtype) if gamma.is_floating_point() else gamma)
        _check.shape("xnorm", "gamma", gamma, (q.shape[1],), "gamma is one number per head")
    limits = ("head width", q.shape[3], WIDEST), ("value width", v.shape[3], WIDEST)
    name, _ = choose("xnorm", backend, q, limits, explain=explain)
    q = _check.finite_queries(mask, q)
    if name == "triton":
        if causal:
            from . import _triton_causal

            return _triton_causal.xnorm(q, k, v, gamma, mask, eps)
        from . import triton

        return triton.xnorm(q, k, v, gamma, mask, eps)
    k, v = _check.cleared(mask, k, v)
    body = reference if name == "reference" else fused.xnorm
    return body(q, k, v, gamma, causal, eps)


def reference(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, causal: bool, eps: float) -> Tensor:
    """The literal equation; masked tokens hold zeros."""
    dtype = q.dtype
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    with no_autocast(q):
        q = q / q.norm(dim=-1, keepdim=True).clamp(min=eps)
        if causal:
            m = (k[..., :, None] * v[..., None, :]).cumsum(2)  # (B, H, N, D, E)
            m = m / m.norm(dim=-2, keepdim=True).clamp(min=eps)
            out = (q[..., None, :] @ m).squeeze(-2)
        else:
            m = k.mT @ v
            out = q @ (m / m.norm(dim=-2, keepdim=True).clamp(min=eps))
        if gamma is not None:
            out = out * gamma.to(out.dtype).square()[:, None, None]
        return out.to(dtype)


def flops(batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int) -> int:
    """Two for each multiply-add of k^T v and of the product with q."""
    return 2 * batch * heads * dim * value_dim * (queries + keys)


class XNormState(NamedTuple):
    """What the causal form remembers: constant in the number of tokens."""

    kv: Tensor  # (B, H, D, E), sum of k v^T


def xnorm_init_state(
    batch: int, heads: int, dim: int, value_dim: int | None = None, *, dtype=torch.float32, device=None
) -> XNormState:
    """The state before the first token; use float64 for float64 tokens, else float32."""
    return XNormState(torch.zeros(batch, heads, dim, value_dim or dim, dtype=dtype, device=device))


def xnorm_step(
    q: Tensor, k: Tensor, v: Tensor, state: XNormState, gamma: Tensor | None = None, *, eps: float = 1e-12
) -> tuple[Tensor, XNormState]:
    """One token of causal XNorm: q, k (B, H, D), v (B, H, E) -> out (B, H, E) and the next state."""
    _check.floating("xnorm_step", q=q, k=k, v=v)
    b, h, d, e = state.kv.shape
    for name, tensor, width in (("q", q, d), ("k", k, d), ("v", v, e)):
        _check.shape("xnorm_step", name, tensor, (b, h, width), "the state was made for these sizes")
    dtype = q.dtype
    q, k, v = (t.to(state.kv.dtype) for t in (q, k, v))
    kv = state.kv + k[..., :, None] * v[..., None, :]
    q = q[..., None, :]
    out = (q @ unit_columns(kv, eps) * row_scale(q, gamma, eps)).squeeze(-2)
    return out.to(dtype), XNormState(kv)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    gamma = 1 + 0.1 * torch.randn(heads, generator=generator, dtype=torch.float64)
    return (*qkv.to(device, dtype).unbind(0), gamma.to(device, dtype)), {}

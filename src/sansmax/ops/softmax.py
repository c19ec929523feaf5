"""Softmax attention: the baseline that every cost is compared with.

    out = softmax(q k^T / sqrt(D)) v

Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1; computed by F.scaled_dot_product_attention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import choose

__all__ = ["example", "flops", "softmax"]


def softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q, k, v: (B, H, N, D), (B, H, M, D), (B, H, M, E), any floating dtype, any strides.
        mask: (B, M) bool, True = keep. Where every key is masked the output is 0.
        causal: query i sees keys j <= i; needs N == M.
        backend: "reference" is the literal equation, the others are F.scaled_dot_product_attention.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, H, N, E).
    """
    _check.qkv("softmax", q, k, v, mask, causal)
    name, _ = choose("softmax", backend, q, explain=explain)
    q, (k, v) = _check.finite_queries(mask, q), _check.cleared(mask, k, v)
    keep = None if mask is None else mask[:, None, None, :]
    if causal and keep is not None:
        keep = keep & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if name == "reference":
        return _reference(q, k, v, keep, causal)
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # A row without any key is NaN in some SDPA kernels: let it see everything, then clear it.
    empty = ~keep.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep | empty)
    return out.masked_fill(empty, 0)


def _reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool) -> Tensor:
    dtype = q.dtype
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal and keep is None:
        keep = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if keep is not None:
        empty = ~keep.any(-1, keepdim=True)
        scores = scores.masked_fill(~(keep | empty), -math.inf)
        return (scores.softmax(-1) @ v).masked_fill(empty, 0).to(dtype)
    return (scores.softmax(-1) @ v).to(dtype)


def flops(batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int) -> int:
    """Two for each multiply-add of q k^T and of the product with v."""
    return 2 * batch * heads * queries * keys * (dim + value_dim)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    return tuple(qkv.to(device, dtype).unbind(0)), {}

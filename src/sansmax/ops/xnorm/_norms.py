"""The two norms of XNorm for any values."""

import torch
from torch import Tensor

from .._eager import finite, readable


def unit_columns(kv: Tensor, eps: Tensor | float) -> Tensor:
    """M / max(||M||_2 over axis -2, eps)."""
    # Squares leave float32 from 2e19 on: the columns are brought to size 1 before their norm is taken.
    top = kv.detach().abs().amax(-2, keepdim=True)
    top = torch.where(top > 0, top, 1)
    kv = kv / top
    return kv / torch.maximum(torch.linalg.vector_norm(kv, dim=-2, keepdim=True), eps / top)


def row_scale(q: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """gamma^2 / max(||q||_2 over axis -1, eps) as (B, H, N, 1)."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    if readable(q) and finite(norm):
        scale = norm.clamp(min=eps).reciprocal()
    else:
        top = largest(q, (-1,), eps)
        scale = torch.linalg.vector_norm(q / top, dim=-1, keepdim=True).clamp(min=1).reciprocal() / top
    return scaled(scale, gamma)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """gamma^2 x, head by head."""
    return x if gamma is None else x * gamma.to(x.dtype).square()[:, None, None]


def largest(x: Tensor, dim: tuple[int, ...], eps: float) -> Tensor:
    return x.detach().abs().amax(dim, keepdim=True).clamp(min=eps)

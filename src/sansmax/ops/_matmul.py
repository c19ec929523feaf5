"""Batched products of strided operands."""

import torch
from torch import Tensor


def heads_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (B, H, N, D) @ b (B, H, D, E) -> (B, H, N, E), without copying strided operands.

    torch.matmul folds (B, H) into one axis, which copies q, k, v when they are views of one qkv projection
    and B, H > 1. One product per head (or per image, whichever are fewer) reads them where they lie.
    """
    if torch.compiler.is_compiling():
        return a @ b
    # torch.matmul finds the same product 20 us later.
    if a.shape[0] == 1:
        return torch.bmm(a[0], b[0])[None]
    if _folds(a) and _folds(b):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    if a.shape[1] <= a.shape[0]:
        products = [x @ y for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
        return torch.stack(products, dim=2).transpose(1, 2)
    return torch.stack([x @ y for x, y in zip(a.unbind(0), b.unbind(0), strict=True)])


def _folds(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(0) == x.stride(1) * x.shape[1]

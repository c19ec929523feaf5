"""Batched products of strided operands, and prefix sums as products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._eager import overwritable

# Tokens of a chunk of `prefix_sums`: 16 and 64 take 0 to 30 % longer (1024 to 16,384 tokens, 512 channels).
CHUNK = 32


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


def prefix_sums(x: Tensor, spare: bool = False) -> Tensor:
    """cumsum(-2) of (..., T, C), as products with a triangle of ones: torch.cumsum takes 3 to 4 times as
    long.

    Terms of one sign are never subtracted. A sum that overflows, which shows in the last row, makes earlier
    rows NaN. With `spare` x may be overwritten.
    """
    if torch.compiler.is_compiling() or x.shape[-2] <= CHUNK:
        return x.cumsum(-2)
    *batch, tokens, width = x.shape
    missing = -tokens % CHUNK
    chunks = (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(-1, CHUNK, width)
    sums = chunks.sum(1).view(*batch, -1, width)
    before = prefix_sums(sums)[..., :-1, :]
    ones = x.new_ones(CHUNK, CHUNK).tril_().expand(chunks.shape[0], -1, -1)
    if spare and overwritable(x):  # the first row of a chunk takes it to all others
        chunks.view(*batch, -1, CHUNK, width)[..., 1:, 0, :] += before
        out = torch.bmm(ones, chunks)
    else:
        before = F.pad(before, (0, 0, 1, 0)).view(-1, 1, width)
        out = torch.baddbmm(before.expand_as(chunks), ones, chunks)
    return out.view(*batch, tokens + missing, width).narrow(-2, 0, tokens)


def _folds(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(0) == x.stride(1) * x.shape[1]

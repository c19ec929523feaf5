"""External attention with the second normalisation behind the memory: one exponential, two N x S arrays."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._backend import no_autocast
from .._eager import finite, overwritable, readable

# Below it the row sums r of a float32 softmax can be 0 where r / (r + eps) is not.
LINEAR_EPS = 1e-30


def external(x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """Masked tokens hold zeros; `mask` is (B, N)."""
    dtype = x.dtype
    # Heads that come from a (B, N, H D) projection are read, and written, where they lie.
    by_token = x.ndim == 4 and x.stride(1) < x.stride(2)
    axis = 1 if by_token else x.ndim - 2
    if by_token:
        x = x.transpose(1, 2)
    if mask is not None:
        mask = mask.view(-1, *(mask.shape[1] if a == axis else 1 for a in range(1, x.ndim)))
    with no_autocast(x):
        if dtype in (torch.float16, torch.bfloat16):
            x, memory_k, memory_v = x.float(), memory_k.float(), memory_v.float()
        out = _attend(x, memory_k, memory_v, mask, axis, eps)
    return (out.transpose(1, 2) if by_token else out).to(dtype)


def _attend(
    x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, axis: int, eps: float
) -> Tensor:
    if readable(x, memory_k, memory_v):
        out = _double_norm(linear(x, memory_k), memory_v, mask, axis, eps)
        # One logit that overflows makes its memory row NaN for every token of the image.
        if finite(out.select(axis, 0)):
            return out
    # Entries beyond the limit count as it: their products would overflow, and inf - inf is NaN.
    limit = torch.finfo(x.dtype).max ** 0.45
    x, memory_k, memory_v = (t.clamp(-limit, limit) for t in (x, memory_k, memory_v))
    return _double_norm(linear(x, memory_k), memory_v, mask, axis, eps)


def _double_norm(a: Tensor, memory_v: Tensor, mask: Tensor | None, axis: int, eps: float) -> Tensor:
    """From the logits to the output; one name for all stages, so that each is freed when the next is made."""
    if mask is not None:
        # Not -inf: where every token is masked the softmax would be NaN.
        a = a.masked_fill(~mask, torch.finfo(a.dtype).min)
    if eps >= LINEAR_EPS:
        a = a.softmax(axis)
        rows = a.sum(-1, keepdim=True) + eps
        a = a.div_(rows) if overwritable(a) else a / rows
        return linear(a, memory_v.mT)
    a = a.log_softmax(axis)
    weight = torch.sigmoid(a.logsumexp(-1, keepdim=True) - math.log(eps)) if eps > 0 else 1
    a = linear(a.softmax(-1), memory_v.mT)
    return a * weight

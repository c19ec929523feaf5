"""SimA without q^ and k^: the norms are folded into the D x D matrix of the "kv" order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import no_autocast
from .._eager import finite, overwritable, readable
from .._matmul import heads_matmul

# Tokens of a causal chunk: inside it the "qk" order, between chunks the running D x E matrix.
CHUNK = 64
# Absolute values taken at a time, 768 KiB in float32: within a second-level cache.
ENTRIES = 3 << 16
# Sums of |q| and of |k| up to here leave float32 room for small values; 100,000 tokens have 3e7 (400
# channels).
LIMIT = 1e10


def sima(q: Tensor, k: Tensor, v: Tensor, causal: bool, eps: float, order: str) -> Tensor:
    """Masked tokens hold zeros; `order` is "qk" or "kv"."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            # The sums over tokens leave the range of float16 and the precision of bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        if causal:
            out = _causal(q, k, v, eps, CHUNK if order == "kv" else q.shape[2])
        else:
            out = _full(q, k, v, eps, order)
        return out.to(dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, eps: float, order: str) -> Tensor:
    if readable(q, k, v):
        abs_sum = _abs_sum if overwritable(q, k) else _recorded_abs_sum
        q_sum, k_sum = abs_sum(q).clamp(min=eps), abs_sum(k).clamp(min=eps)  # (B, H, D)
        scale = q_sum * k_sum
        if order == "qk":
            out = heads_matmul(heads_matmul(q / scale[..., None, :], k.mT), v)
        else:
            out = heads_matmul(q, heads_matmul(k.mT, v) / scale[..., None])
        # An overflow of k^T v reaches every row, since 0 * inf is NaN.
        if torch.maximum(q_sum, k_sum).sum().item() < LIMIT and finite(out[:, :, 0]):
            return out
    q, k = _unit(q, eps), _unit(k, eps)
    if order == "qk":
        return heads_matmul(heads_matmul(q, k.mT), v)
    return heads_matmul(q, heads_matmul(k.mT, v))


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / max(sum_tokens |x|, eps) for any finite x, also where the sum leaves the range."""
    top = x.detach().abs().amax(-2, keepdim=True).clamp(min=eps)
    x = x / top
    return x / torch.maximum(x.abs().sum(-2, keepdim=True), eps / top)


def _recorded_abs_sum(x: Tensor) -> Tensor:
    return x.abs().sum(-2)


def _abs_sum(x: Tensor) -> Tensor:
    """sum_tokens |x|, where nothing is recorded.

    Heads outermost, so that a thread sums the heads that it took the absolute values of: 0.014 ms at 196
    tokens and 6 heads where the layout of x, tokens outermost, takes 0.023 to 0.065. Some tokens at a time:
    fresh pages for an array of the size of x can cost more than all the rest (4 to 20 ms at 4096 tokens).
    """
    rows = max(1, ENTRIES // (x.shape[0] * x.shape[1] * x.shape[3]))
    if x.shape[2] <= rows:
        return torch.abs(x, out=x.new_empty(x.shape)).sum(-2)
    first, *others = x.split(rows, -2)
    buffer = x.new_empty(first.shape)
    total = torch.abs(first, out=buffer).sum(-2)
    for part in others:
        total += torch.abs(part, out=buffer[:, :, : part.shape[2]]).sum(-2)
    return total


def _causal(q: Tensor, k: Tensor, v: Tensor, eps: float, chunk: int) -> Tensor:
    q_sum = q.abs().cumsum(-2).clamp(min=eps)
    k_sum = k.abs().cumsum(-2).clamp(min=eps)
    if readable(q, k, v) and not finite(heads_matmul(k.mT, v)):
        # One scale per channel cancels in k / Sk. It is not the default because it looks ahead: early keys
        # that are 1e38 times smaller than the largest would vanish.
        top = k.detach().abs().amax(-2, keepdim=True).clamp(min=eps)
        k, k_sum = k / top, k_sum / top
    weights = q / q_sum / k_sum
    tokens = q.shape[2]
    # (B, H, chunks, chunk, .): zeros at the end change no earlier row.
    missing = -tokens % chunk
    weights, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for t in (weights, k, v))
    kv = k.mT @ v
    before = F.pad(kv.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    out = (weights @ k.mT).tril() @ v + weights @ before
    return out.flatten(2, 3)[:, :, :tokens]

"""SimA without q^ and k^: the norms are folded into the D x D matrix of the "kv" order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import no_autocast
from .._matmul import finite, heads_matmul

# Tokens of a causal chunk: inside it the "qk" order, between chunks the running D x E matrix.
CHUNK = 64


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
    q_sum, k_sum = (t.abs().sum(-2).clamp_(min=eps) for t in (q, k))  # (B, H, D)
    # One division after the other: the product of the sums may leave the range of float32.
    if order == "qk":
        return heads_matmul(heads_matmul(q / q_sum[..., None, :] / k_sum[..., None, :], k.mT), v)
    kv = heads_matmul(k.mT, v)
    if q.is_cpu and not torch.compiler.is_compiling() and finite(kv):
        kv = kv / k_sum[..., None]
    else:
        # |k^| <= 1, so this cannot overflow whatever k holds; it costs a pass over k.
        kv = heads_matmul((k / k_sum[..., None, :]).mT, v)
    return heads_matmul(q, kv / q_sum[..., None])


def _causal(q: Tensor, k: Tensor, v: Tensor, eps: float, chunk: int) -> Tensor:
    q_sum = q.abs().cumsum(-2).clamp(min=eps)
    k_sum = k.abs().cumsum(-2).clamp(min=eps)
    if q.is_cpu and not torch.compiler.is_compiling() and not finite(k.mT @ v):
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

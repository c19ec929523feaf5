"""XNorm with the norms of the queries applied to the output, so that q^ is never written out."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._backend import no_autocast
from .._eager import finite, overwritable, readable
from .._matmul import heads_matmul

# Tokens of a causal chunk. The column norms need the D x E matrix of every token, CHUNK of them at a time.
CHUNK = 16


def xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, causal: bool, eps: float) -> Tensor:
    """Masked tokens hold zeros."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            # k^T v leaves the range of float16 and the precision of bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        out = _causal(q, k, v, gamma, eps) if causal else _full(q, k, v, gamma, eps)
        return out.to(dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    kv = heads_matmul(k.mT, v)
    # As squares, a norm that exceeds eps must not vanish in float32.
    squares = kv.square().sum(-2, keepdim=True) if readable(q, kv) and eps >= 1e-15 else None
    if squares is not None and finite(squares):
        # 0.02 ms for 6 heads of 64, `unit_columns` takes 0.1.
        kv = kv / squares.clamp(min=eps * eps).sqrt()
    else:
        # Scales of k and of v's channels cancel, except in eps; with them k^T v cannot overflow.
        k_top, v_top = _top(k, (-2, -1), eps), _top(v, (-2,), eps)
        kv = unit_columns(heads_matmul((k / k_top).mT, v / v_top), eps / k_top / v_top)
    out, scale = heads_matmul(q, kv), row_scale(q, gamma, eps)
    return out.mul_(scale) if overwritable(out, scale) else out * scale


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
        top = _top(q, (-1,), eps)
        scale = torch.linalg.vector_norm(q / top, dim=-1, keepdim=True).clamp(min=1).reciprocal() / top
    return scale if gamma is None else scale * gamma.to(scale.dtype).square()[:, None, None]


def _causal(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    outs, kv = [], k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    # The backward pass makes the matrices of a chunk again instead of keeping those of all tokens.
    recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    for q_i, k_i, v_i in zip(q.split(CHUNK, 2), k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        if recompute:
            out, kv = checkpoint(_causal_chunk, q_i, k_i, v_i, kv, eps, use_reentrant=False)
        else:
            out, kv = _causal_chunk(q_i, k_i, v_i, kv, eps)
        outs.append(out)
    return torch.cat(outs, dim=2) * row_scale(q, gamma, eps)


def _causal_chunk(q: Tensor, k: Tensor, v: Tensor, before: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2) + before[:, :, None]
    return (q[..., None, :] @ unit_columns(kv, eps)).squeeze(-2), kv[:, :, -1]


def _top(x: Tensor, dim: tuple[int, ...], eps: float) -> Tensor:
    return x.detach().abs().amax(dim, keepdim=True).clamp(min=eps)

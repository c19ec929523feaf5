"""External attention: every token attends to S learned memory rows that all samples share.

    a~   = x memory_k^T                              (N, S)
    a^   = exp(a~_ij) / sum_n exp(a~_nj)             softmax over the N TOKENS
    a    = a^_ij / (eps + sum_s a^_is)               l1 over the S memory rows
    out  = a memory_v

Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", section 3
(arXiv 2105.02358); published code model_torch.py and multi_head_attention_torch.py, whose heads share the
memory. There is no 1/sqrt(D). eps (1e-9, in the code only) matters: a token that wins in no memory row has a
row sum far below it, and its output goes to 0. A bias of memory_k cancels in the softmax over tokens; one of
memory_v is the caller's to add.

The softmax over tokens couples all of them: there is no causal form and no decoding token by token.
"""

import math

import torch
from torch import Tensor

from .. import _check
from .._backend import choose, no_autocast
from . import fused

__all__ = ["example", "external", "external_map", "flops"]

# Of the kernels: a program holds the logits of some tokens for all memory rows; they overflow beyond a width.
MOST_ROWS = 256
WIDEST = 8192


def external(
    x: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-9,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """External attention (see the module for the equation).

    Args:
        x: (B, N, D) or (B, H, N, D), any floating dtype, any strides.
        memory_k, memory_v: (S, D) and (S, E), shared by all samples and heads.
        mask: (B, N) bool, True = keep. A masked token enters no sum, and its own output is 0.
        eps: added to the row sums, >= 0; 0 is exact too (rows then sum to 1).
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, N, E) or (B, H, N, E) in the dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, eps or backend do not fit.
    """
    _checked("external", x, memory_k, mask, eps)
    _check.floating("external", x=x, memory_v=memory_v)
    _check.shape("external", "memory_v", memory_v, (memory_k.shape[0], "E"), "it has the rows of memory_k")
    limits = (("memory rows", memory_k.shape[0], MOST_ROWS), ("token width", x.shape[-1], WIDEST))
    name, _ = choose("external", backend, x, limits, explain=explain)
    if name == "triton":
        from . import triton

        return triton.external(x, memory_k, memory_v, mask, eps)
    (x,) = _check.cleared(mask, x)
    body = reference if name == "reference" else fused.external
    (out,) = _check.cleared(mask, body(x, memory_k, memory_v, mask, eps))
    return out


def external_map(x: Tensor, memory_k: Tensor, *, mask: Tensor | None = None, eps: float = 1e-9) -> Tensor:
    """The doubly normalised map `a`: (B, N, S) or (B, H, N, S); arguments and errors as in `external`."""
    _checked("external_map", x, memory_k, mask, eps)
    (x,) = _check.cleared(mask, x)
    (out,) = _check.cleared(mask, _map(x, memory_k, mask, eps).to(x.dtype))
    return out


def reference(x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """The literal equation; masked tokens hold zeros."""
    attention = _map(x, memory_k, mask, eps)
    with no_autocast(x):
        return (attention @ memory_v.to(attention.dtype)).to(x.dtype)


def _map(x: Tensor, memory_k: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """a = softmax_S(log a^) r / (r + eps) with r the row sums of a^: nothing underflows, and eps may be 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        logits = x.to(dtype) @ memory_k.to(dtype).mT
        if mask is not None:
            masked = ~mask.view(mask.shape[0], *(1,) * (x.ndim - 3), -1, 1)
            logits = logits.masked_fill(masked, torch.finfo(dtype).min)
        log_attention = logits.log_softmax(-2)
        log_rows = log_attention.logsumexp(-1, keepdim=True)
        return log_attention.softmax(-1) * torch.sigmoid(log_rows - (math.log(eps) if eps else -math.inf))


def _checked(op: str, x: Tensor, memory_k: Tensor, mask: Tensor | None, eps: float) -> None:
    _check.floating(op, x=x, memory_k=memory_k)
    heads = ("H",) if x.ndim == 4 else ()
    _check.shape(op, "x", x, ("B", *heads, "N", "D"), "or (B, H, N, D); flatten images to tokens first")
    _check.shape(op, "memory_k", memory_k, ("S", x.shape[-1]), "one row per memory unit, as wide as x")
    _check.key_mask(op, mask, x.shape[0], x.shape[-2], x)
    _check.eps(op, eps, zero=True)


def flops(batch: int, heads: int, tokens: int, dim: int, value_dim: int, memory: int) -> int:
    """Two for each multiply-add of the two matrix products; linear in the tokens."""
    return 2 * batch * heads * tokens * memory * (dim + value_dim)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments: several heads, 7 memory rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, tokens, dim), (7, dim), (7, dim)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(t.to(device, dtype) for t in made), {}

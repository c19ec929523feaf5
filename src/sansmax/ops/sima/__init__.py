"""SimA: simple softmax-free attention.

    q^ = q / max(sum_tokens |q|, eps)      k^ = k / max(sum_tokens |k|, eps)      per batch, head and CHANNEL
    out = (q^ k^^T) v  =  q^ (k^^T v)

v is left alone; no scale, no softmax. Koohpayegani and Pirsiavash, "SimA: Simple Softmax-free Attention for
Vision Transformers", WACV 2024 (arXiv 2206.08898), published code sima.py, class SimA. The l1 norms run over
the tokens (dim -2); eps is a floor, not an addend. The output shrinks like 1/N: duplicating all tokens halves
it.

The causal form replaces the sums by prefix sums: y_i = (q_i / Sq_i) diag(1 / Sk_i) sum_{j<=i} k_j v_j^T. It
is not in the paper; it is what the equation gives for the last token of the prefix that ends at i.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._backend import choose, no_autocast
from .._eager import for_all
from . import fused

__all__ = ["SimAState", "example", "flops", "order_for", "sima", "sima_init_state", "sima_step"]

ORDERS = ("auto", "qk", "kv")
KERNEL_FORMS = ("", "causal")
# Of the kernels: a matrix of a head is held whole.
WIDEST = 128


def sima(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-12,
    order: str = "auto",
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """SimA attention (see the module for the equation).

    Args:
        q, k, v: (B, H, N, D), (B, H, M, D), (B, H, M, E), any floating dtype, any strides. M != N is allowed.
        mask: (B, M) bool over the keys, True = keep. A masked token enters neither the sums nor the products.
        query_mask: (B, N) bool over the queries, which share one sum: a masked query leaves it, and its own
            output is 0. The default is `mask` where M == N (self-attention) and no mask elsewhere.
        causal: prefix sums in place of sums; needs N == M.
        eps: floor of the l1 sums, 1e-12 as published (1e-6 in the published class attention).
        order: "qk" for (q k^T) v, "kv" for q (k^T v), "auto" for the one with fewer FLOPs; same result.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, H, N, E) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, order or backend do not fit.
    """
    _check.qkv("sima", q, k, v, mask, causal)
    _check.eps("sima", eps)
    if order not in ORDERS:
        raise ValueError(
            f"sima: order must be one of {', '.join(ORDERS)}, got {order!r}; use 'auto' if unsure"
        )
    limits = ("head width", q.shape[3], WIDEST), ("value width", v.shape[3], WIDEST)
    name, _ = choose("sima", backend, q, limits, explain=explain)
    if query_mask is None and q.shape[2] == k.shape[2]:
        query_mask = mask
    _check.key_mask("sima", query_mask, q.shape[0], q.shape[2], q)
    if name == "triton":
        if causal:
            from . import _triton_causal

            if mask is not query_mask:  # the kernel takes one mask for queries and keys
                k, v = _check.cleared(mask, k, v)
                (q,) = _check.cleared(query_mask, q)
                mask = None
            return _triton_causal.sima(q, k, v, mask, eps)
        from . import triton

        return triton.sima(q, k, v, mask, query_mask, eps)
    k, v = _check.cleared(mask, k, v)
    (q,) = _check.cleared(query_mask, q)
    if name == "reference":
        return reference(q, k, v, causal, eps)
    if order == "auto":
        lengths = q.shape[2], k.shape[2]
        order = "kv" if for_all(*lengths) else order_for(*lengths, q.shape[3], v.shape[3])
    return fused.sima(q, k, v, causal, eps, order)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, eps: float) -> Tensor:
    """The literal equation; masked tokens hold zeros."""
    dtype = q.dtype
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    with no_autocast(q):
        if causal:
            q_sum, k_sum = (t.abs().cumsum(-2).clamp(min=eps) for t in (q, k))
            return ((q / q_sum / k_sum) @ k.mT).tril().matmul(v).to(dtype)
        q_sum, k_sum = (t.abs().sum(-2, keepdim=True).clamp(min=eps) for t in (q, k))
        return ((q / q_sum) @ (k / k_sum).mT).matmul(v).to(dtype)


def order_for(queries: int, keys: int, dim: int, value_dim: int) -> str:
    """The cheaper of N M (D + E) and D E (N + M) multiply-adds per head; at a tie "kv", as published."""
    return "qk" if queries * keys * (dim + value_dim) < dim * value_dim * (queries + keys) else "kv"


def flops(batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int) -> int:
    """Two for each multiply-add of the two matrix products in the cheaper order."""
    if order_for(queries, keys, dim, value_dim) == "qk":
        return 2 * batch * heads * queries * keys * (dim + value_dim)
    return 2 * batch * heads * dim * value_dim * (queries + keys)


class SimAState(NamedTuple):
    """What the causal form remembers: constant in the number of tokens."""

    kv: Tensor  # (B, H, D, E), sum of k v^T
    q_sum: Tensor  # (B, H, D), sum of |q|
    k_sum: Tensor  # (B, H, D), sum of |k|


def sima_init_state(
    batch: int, heads: int, dim: int, value_dim: int | None = None, *, dtype=torch.float32, device=None
) -> SimAState:
    """The state before the first token; use float64 for float64 tokens, else float32."""
    zeros = torch.zeros(batch, heads, dim, dtype=dtype, device=device)
    return SimAState(zeros.new_zeros(batch, heads, dim, value_dim or dim), zeros, zeros)


def sima_step(
    q: Tensor, k: Tensor, v: Tensor, state: SimAState, *, eps: float = 1e-12
) -> tuple[Tensor, SimAState]:
    """One token of causal SimA: q, k (B, H, D), v (B, H, E) -> out (B, H, E) and the next state."""
    _check.floating("sima_step", q=q, k=k, v=v)
    b, h, d, e = state.kv.shape
    for name, tensor, width in (("q", q, d), ("k", k, d), ("v", v, e)):
        _check.shape("sima_step", name, tensor, (b, h, width), "the state was made for these sizes")
    dtype = q.dtype
    q, k, v = (t.to(state.kv.dtype) for t in (q, k, v))
    state = SimAState(
        state.kv + k[..., :, None] * v[..., None, :], state.q_sum + q.abs(), state.k_sum + k.abs()
    )
    weights = q / state.q_sum.clamp(min=eps) / state.k_sum.clamp(min=eps)
    return torch.einsum("bhd,bhde->bhe", weights, state.kv).to(dtype), state


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    return tuple(qkv.to(device, dtype).unbind(0)), {}

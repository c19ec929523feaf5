"""SimA over parts of the tokens: first the sums of all parts, then the queries of each.

    Sq = sum |q|    Sk = sum |k|    M = sum k^T v      over the tokens of all parts, in float64
    out = q diag(1 / (max(Sq, eps) max(Sk, eps))) M    for the queries of any part

The same equation as sansmax.ops.sima without a mask.
"""

from torch import Tensor

from .._backend import no_autocast
from . import SimAState

__all__ = ["applied", "summed"]


def summed(q: Tensor, k: Tensor, v: Tensor, before: SimAState | None = None) -> SimAState:
    """The sums over the tokens of a part, q, k (B, H, N, D), v (B, H, N, E), on top of `before`."""
    with no_autocast(q):
        q, k, v = q.double(), k.double(), v.double()
        sums = SimAState(k.mT @ v, q.abs().sum(-2), k.abs().sum(-2))
    return sums if before is None else SimAState(*(a + b for a, b in zip(before, sums, strict=True)))


def applied(q: Tensor, state: SimAState, eps: float) -> Tensor:
    """q (B, H, N, D) -> (B, H, N, E) in the dtype of q."""
    with no_autocast(q):
        q_sum, k_sum = state.q_sum.clamp(min=eps), state.k_sum.clamp(min=eps)
        return (q.double() @ (state.kv / (q_sum * k_sum)[..., None])).to(q.dtype)

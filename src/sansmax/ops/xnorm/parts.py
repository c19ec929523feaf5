"""XNorm over parts of the tokens: first K^T V of all parts, then the queries of each.

    M = sum k^T v                                                   over the tokens of all parts, in float64
    out = gamma^2 q / max(||q||, eps)  (M / max(||M||, eps))        for the queries of any part

The same equation as sansmax.ops.xnorm without a mask; the norms of M are those of its columns.
"""

from torch import Tensor

from .._backend import no_autocast
from . import XNormState
from ._norms import row_scale, unit_columns

__all__ = ["applied", "summed"]


def summed(k: Tensor, v: Tensor, before: XNormState | None = None) -> XNormState:
    """The sum over the tokens of a part, k (B, H, N, D), v (B, H, N, E), on top of `before`."""
    with no_autocast(k):
        kv = k.double().mT @ v.double()
    return XNormState(kv if before is None else before.kv + kv)


def applied(q: Tensor, state: XNormState, gamma: Tensor | None, eps: float) -> Tensor:
    """q (B, H, N, D) -> (B, H, N, E) in the dtype of q."""
    with no_autocast(q):
        double = q.double()
        return (double @ unit_columns(state.kv, eps) * row_scale(double, gamma, eps)).to(q.dtype)

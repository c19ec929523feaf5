"""AFT-simple over parts of the tokens: first the weighted sums of all parts, then the gates of each.

    top = max k    num = sum exp(k - top) v    den = sum exp(k - top)      over all parts, in float64
    out = sigmoid(q) num / den                                             for the queries of any part

The same equation as sansmax.ops.aft.simple without a mask.
"""

from torch import Tensor

from ..._backend import no_autocast
from .. import _triple
from .._triple import Triple

__all__ = ["applied", "summed"]


def summed(k: Tensor, v: Tensor, before: Triple | None = None) -> Triple:
    """The sums over the tokens of a part, k and v (B, T, C), on top of `before`; one token each."""
    with no_autocast(k):
        sums = _triple.total(_triple.tokens(k.double(), v.double()))
        return sums if before is None else _triple.combine(before, sums)


def applied(q: Tensor, state: Triple) -> Tensor:
    """q (B, T, C) -> (B, T, C) in the dtype of q."""
    with no_autocast(q):
        return (q.double().sigmoid() * _triple.finish(state)).to(q.dtype)

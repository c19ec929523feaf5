"""AFT-full on a GPU: see sansmax.ops.aft._triton. A bias in factors is formed first, once for the batch."""

import torch
from torch import Tensor

from ..._backend import no_autocast
from .. import _triton as tiles


def aft_full(
    q: Tensor, k: Tensor, v: Tensor, w: tuple[Tensor, ...], mask: Tensor | None, causal: bool
) -> Tensor:
    tokens = q.shape[1]
    return tiles.average(q, k, v, dense(w, tokens), mask, tokens, causal)


def dense(w: tuple[Tensor, ...], tokens: int) -> Tensor:
    """w (T, T)."""
    if len(w) == 1:
        return w[0][:tokens, :tokens]
    left, right = (factor[:tokens].to(torch.float32) for factor in w)
    with no_autocast(left):
        return left @ right.mT

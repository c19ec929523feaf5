"""AFT-local on a GPU: see sansmax.ops.aft._triton, tiles where the window reaches and running sums beyond."""

from torch import Tensor

from .. import _triton as tiles
from ..full.triton import dense


def aft_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: tuple[Tensor, ...],
    mask: Tensor | None,
    window: int,
    causal: bool,
) -> Tensor:
    return tiles.average(q, k, v, dense(w, q.shape[1]), mask, window, causal)

"""AFT-conv for any keys and biases: disjoint regions as triples, so that nothing is subtracted or lost.

Centred: the kernel box, the strips left and right of it, the rows above and below. Causal: the kernel and what lies
before it. Each sum has its own maximum; linear in the number of tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _triple
from .._triple import Triple

# Taps that are read at a time: their products are held.
_TAPS = 16


def by_regions(
    k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], prefix: int, causal: bool
) -> Tensor:
    """k (B, T, H), v (B, T, H, dh), w (H, kernel rows, kernel columns) -> averages (B, T, H, dh)."""
    everything = _triple.tokens(k.mT.unsqueeze(-1), v.transpose(1, 2))  # (B, H, T, dh), (B, H, T, 1) twice
    cells = everything.map(lambda part: part[:, :, prefix:].unflatten(2, grid))
    rows, columns = w.shape[1] // 2, w.shape[2] // 2
    left, right = (w.shape[2] - 1, 0) if causal else (columns, columns)

    upto = _triple.scan(cells)
    strips = _triple.shift(upto, left + 1)
    parts = []
    if not causal:
        strips = _triple.combine(strips, _reversed(cells, right + 1))
        whole_rows = upto.map(lambda part: part[..., -1, :])
        above = _triple.shift(_triple.scan(whole_rows), rows + 1)
        parts += [_unsqueeze(above, -2), _unsqueeze(_reversed(whole_rows, rows + 1), -2)]

    strips, cells = _pad(strips, (0, 0, 0, 0, rows, rows)), _pad(cells, (0, 0, left, right, rows, rows))
    for row in range(w.shape[1]):
        parts.append(_narrow(strips, 2, row, grid[0]))
        row_cells = _narrow(cells, 2, row, grid[0])
        for first in range(0, w.shape[2], _TAPS):
            taps = w[:, row, first : first + _TAPS]
            parts.append(_box(_narrow(row_cells, 3, first, grid[1] + taps.shape[1] - 1), taps))

    if prefix:
        parts.append(_unsqueeze(_triple.total(_narrow(everything, 2, 0, prefix)), 2))
    average = _triple.finish(_triple.combine(*parts)).flatten(2, 3)
    if prefix:
        mean = _triple.finish(_triple.total(everything))
        average = torch.cat([mean.expand(-1, -1, prefix, -1), average], 2)
    return average.transpose(1, 2)


def _box(cells: Triple, w: Tensor) -> Triple:
    """The sum over the taps w (H, taps) that start at each cell."""
    taps = w.shape[1]
    value, key = cells.num.unfold(3, taps, 1), cells.top.unfold(3, taps, 1)  # (B, H, rows, columns, ., taps)
    exponents = key + w[:, None, None, None]
    top = exponents.detach().amax(-1)
    weights = _triple.weight(exponents, top.unsqueeze(-1))
    return Triple((weights * value).sum(-1), weights.sum(-1), top)


def _reversed(x: Triple, by: int) -> Triple:
    """Entry t sums the entries from t + by to the end."""
    return _triple.flip(_triple.shift(_triple.scan(_triple.flip(x)), by))


def _pad(x: Triple, pad: tuple[int, ...]) -> Triple:
    return Triple(F.pad(x.num, pad), F.pad(x.den, pad), F.pad(x.top, pad, value=-torch.inf))


def _narrow(x: Triple, dim: int, start: int, length: int) -> Triple:
    return x.map(lambda part: part.narrow(dim, start, length))


def _unsqueeze(x: Triple, dim: int) -> Triple:
    return x.map(lambda part: part.unsqueeze(dim))

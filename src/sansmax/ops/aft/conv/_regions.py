"""AFT-conv for any keys and biases: disjoint regions as triples, so that nothing is subtracted or lost.

Centred: the kernel box, the strips left and right of it, the rows above and below. Causal: the kernel and
what lies before it. Each sum has its own maximum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _triple
from .._triple import Triple

# Taps that are read at a time: their products are held.
_TAPS = 16


def by_regions(
    k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], prefix: int, short: tuple[bool, bool] | None
) -> Tensor:
    """k (B, H, T), v (B, H, T, dh), w (H, kernel rows, kernel columns) -> averages (B, H, T, dh).

    `short` tells of each side of the grid whether a matrix serves it; None asks for the causal form.
    """
    everything = _triple.tokens(k.unsqueeze(-1), v)
    cells = everything.map(lambda part: part[:, :, prefix:].unflatten(2, grid))  # (B, H, rows, columns, .)
    rows, columns = w.shape[1] // 2, w.shape[2] // 2
    if short is None:
        left, right = w.shape[2] - 1, 0
        strips, parts = _triple.shift(_triple.scan(cells), left + 1), []
    else:
        left = right = columns
        whole_rows = _triple.total(cells).map(lambda part: part.squeeze(-2))
        strips = _far(cells, columns, short[1])
        parts = [_far(whole_rows, rows, short[0]).map(lambda part: part.unsqueeze(-2))]

    strips, cells = _pad(strips, (0, 0, 0, 0, rows, rows)), _pad(cells, (0, 0, left, right, rows, rows))
    for row in range(w.shape[1]):
        parts.append(_narrow(strips, 2, row, grid[0]))
        row_cells = _narrow(cells, 2, row, grid[0])
        for first in range(0, w.shape[2], _TAPS):
            taps = w[:, row, first : first + _TAPS]
            parts.append(_box(_narrow(row_cells, 3, first, grid[1] + taps.shape[1] - 1), taps))

    if prefix:
        parts.append(_triple.total(_narrow(everything, 2, 0, prefix)).map(lambda part: part.unsqueeze(2)))
    average = _triple.finish(_triple.combine(*parts)).flatten(2, 3)
    if prefix:
        mean = _triple.finish(_triple.total(everything))
        average = torch.cat([mean.expand(-1, -1, prefix, -1), average], 2)
    return average


def _far(x: Triple, reach: int, short: bool) -> Triple:
    """Entry t sums the entries u with |u - t| > reach."""
    if short:
        near = distance(x.top.shape[-2], x.top.device) <= reach
        exponents = x.top.mT.masked_fill(near, -torch.inf)  # (..., t, u)
        top = exponents.detach().amax(-1, keepdim=True)
        weights = _triple.weight(exponents, top)
        return Triple(weights @ x.num, weights @ x.den, top)
    after = _triple.flip(_triple.shift(_triple.scan(_triple.flip(x)), reach + 1))
    return _triple.combine(_triple.shift(_triple.scan(x), reach + 1), after)


def _box(cells: Triple, w: Tensor) -> Triple:
    """The sum over the taps w (H, taps) that start at each cell."""
    taps = w.shape[1]
    value, key = cells.num.unfold(3, taps, 1), cells.top.unfold(3, taps, 1)  # (B, H, rows, columns, ., taps)
    exponents = key + w[:, None, None, None]
    top = exponents.detach().amax(-1)
    weights = _triple.weight(exponents, top.unsqueeze(-1))
    return Triple((weights * value).sum(-1), weights.sum(-1), top)


def _pad(x: Triple, pad: tuple[int, ...]) -> Triple:
    return Triple(F.pad(x.num, pad), F.pad(x.den, pad), F.pad(x.top, pad, value=-torch.inf))


def _narrow(x: Triple, dim: int, start: int, length: int) -> Triple:
    return x.map(lambda part: part.narrow(dim, start, length))


def distance(length: int, device: torch.device) -> Tensor:
    """(length, length): |t - u|."""
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs()

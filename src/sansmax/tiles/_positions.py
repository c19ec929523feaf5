"""Positions of a rectangle of tokens, without those of all others."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.xcit import PositionalEncodingFourier
from torch import Tensor

from ..layers._contract import Grid
from ._scratch import Box

__all__ = ["resampled", "separable"]


def resampled(table: Tensor, old: Grid) -> Callable[[Grid], Callable[[Box], Tensor]]:
    """Boxes of timm's resample_abs_pos_embed, which treats rows and columns one after the other."""
    values = table[0].unflatten(0, old).float()

    def of_grid(grid: Grid) -> Callable[[Box], Tensor]:
        rows, columns = (
            F.interpolate(
                torch.eye(few, device=table.device)[None, None], (many, few), mode="bicubic", antialias=True
            )[0, 0]
            for few, many in zip(old, grid, strict=True)
        )

        def of_box(box: Box) -> Tensor:
            across = torch.einsum("jw,hwc->hjc", columns[box.left : box.right], values)
            return torch.einsum("ih,hjc->ijc", rows[box.top : box.bottom], across).to(table.dtype)

        return of_box

    return of_grid


def separable(module: PositionalEncodingFourier) -> Callable[[Grid], Callable[[Box], Tensor]]:
    """Boxes of Fourier positions, a sum of one term of the row and one of the column."""
    dtype = next(module.parameters()).dtype
    module = copy.deepcopy(module).double()

    def of_grid(grid: Grid) -> Callable[[Box], Tensor]:
        rows, columns, both = (
            module(1, *size)[0].permute(1, 2, 0) for size in ((grid[0], 1), (1, grid[1]), (1, 1))
        )
        columns = columns - both

        def of_box(box: Box) -> Tensor:
            return (rows[box.top : box.bottom] + columns[:, box.left : box.right]).to(dtype)

        return of_box

    return of_grid

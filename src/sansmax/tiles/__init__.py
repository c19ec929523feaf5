"""Networks over images of any size: tile after tile, with the exact sums over all tokens.

A layer whose tokens meet in sums alone (SimA, XNorm, AFT-simple, the class attentions) sees every tile twice:
first its tokens enter the sums, then the sums give each tile its output. All else of a block looks at one
token, or, as a convolution, at its neighbours, which are read along. Between two blocks the tokens lie in a
file. Memory depends on the tile, and neither on the height nor, but for one row of patches, on the width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from ..layers._contract import Grid
from ._scratch import Box, Scratch, check_space
from ._source import Pixels, Unreadable, libvips, open_pixels
from ._trunk import Trunk, trunk_of

__all__ = ["Unreadable", "check_tiled", "features_tiled", "predict_tiled", "scratch_bytes"]

NOTHING = Box(0, 0, 0, 0)


def predict_tiled(
    model: nn.Module,
    source: Any,
    *,
    tile: int = 1024,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    scratch: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, tiles: None,
) -> Tensor:
    """The logits of `model` for an image that need not fit into memory: those of model(image) in eval mode.

    The image keeps its own size. A grid of ceil(side / patch) tokens covers it: a Vision Transformer sees
    zeros (the mean colour) beyond the last pixels, as timm's dynamic_img_pad fills them, XCiT's convolutions
    their own padding. Learned positions are resampled to the grid, as set_input_size does.

    Sums over tokens are accumulated in float64; all else runs in the dtype and on the device of the weights.
    Besides the weights, memory holds some arrays of one tile and, of the image, rows with the pixels of a
    tile: one row of patches and its neighbours at least, 3 * 3 * patch bytes a column of pixels.

    Args:
        model: a Vision Transformer of timm or sansmax, or an XCiT or X-ViT of sansmax, whose layers are
            SimA, XNorm or AFTSimple; class attention of SimA, XNorm or softmax. It stays as it is.
        source: a file (pyvips reads it row by row; upright, alpha on white, 16 bits as 8); a float Tensor
            (in_chans, height, width), normalised; or an array of uint8 (height, width, in_chans) with a shape
            and rows as slices, as np.memmap has: its rows are read from top to bottom, each once.
        tile: pixels of a tile's side, a multiple of the patch.
        mean, std: of each channel, for pixels 0..1; None: as the network's data config says. A tensor is
            taken as it is.
        scratch: a folder for the tokens (see scratch_bytes); None: the one for temporary files. The file
            has no name, so that nothing is left whatever happens.
        progress: is told the tiles that are done, and all of them.

    Returns:
        (1, num_classes).

    Raises:
        ValueError, TypeError, OSError: the network has another layer, the image cannot be read, or the disk
            is full; one sentence says what to do.
    """
    trunk = trunk_of(model)
    features = _features(trunk, model, source, tile, mean, std, scratch, progress)
    with torch.inference_mode():
        return trunk.head(features)


def check_tiled(model: nn.Module, tile: int = 1024, scratch: str | Path | None = None) -> None:
    """Raises ValueError where `predict_tiled` cannot read files, take the network or tiles of that side, or
    write to that folder."""
    libvips()
    trunk_of(model).check_tile(tile)
    check_space(scratch, 0)


def scratch_bytes(model: nn.Module, size: Grid) -> int:
    """Of the files for an image of `size`, (height, width), in pixels."""
    trunk = trunk_of(model)
    return trunk.files * trunk.tokens_bytes(trunk.grid(size))


def features_tiled(
    model: nn.Module,
    source: Any,
    *,
    tile: int = 1024,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    scratch: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, tiles: None,
) -> Tensor:
    """The tokens that model.forward_head pools to the same: (1, n, C); see predict_tiled."""
    return _features(trunk_of(model), model, source, tile, mean, std, scratch, progress)


def _features(
    trunk: Trunk,
    model: nn.Module,
    source: Any,
    tile: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    scratch: str | Path | None,
    progress: Callable[[int, int], None],
) -> Tensor:
    trunk.check_tile(tile)
    config = resolve_model_data_config(model)
    pixels = open_pixels(source, trunk.in_chans, mean or config["mean"], std or config["std"])
    with pixels, torch.inference_mode():
        return _run(trunk, pixels, tile, scratch, progress)


def _run(
    trunk: Trunk, pixels: Pixels, tile: int, folder: str | Path | None, progress: Callable[[int, int], None]
) -> Tensor:
    grid, side = trunk.grid(pixels.size), tile // trunk.patch
    strips, boxes = list(_strips(trunk, pixels.size, tile)), list(_boxes(grid, side))
    # No other token counts behind the last block of a network that asks for its class token.
    alone = [NOTHING] if trunk.pool.first_alone and trunk.pool.enters is None else boxes
    pieces = len(strips) * -(-grid[1] // side) + (len(trunk.stages) - 1) * len(boxes) + len(alone)
    done = 0
    check_space(folder, trunk.files * trunk.tokens_bytes(grid))
    prefix = trunk.stages[0].enters
    positions = None if trunk.positions is None else trunk.positions(grid)
    file = partial(Scratch, folder, grid, trunk.dim, trunk.weight)
    with file() as kept, file() as other:
        for rows in strips:
            for box, tokens in _embedded(trunk, pixels, positions, rows, side):
                kept.write(box, tokens)
                trunk.stages[0].count(prefix, tokens)
                progress(done := done + 1, pieces)
        for stage, following in zip(trunk.stages, [*trunk.stages[1:], trunk.pool], strict=True):
            last, before = following is trunk.pool, prefix
            target = other if stage.halo else kept
            for box in alone if last else boxes:
                wide = box.grown(stage.halo, grid)
                left, y = stage(before, kept.read(wide))
                y = y[box.within(wide)]
                if not last:
                    target.write(box, y)
                prefix = left if following.enters is None else following.enters
                following.count(prefix, y)
                progress(done := done + 1, pieces)
            if stage.halo:
                kept, other = other, kept
    return trunk.pool.tokens()


def _strips(trunk: Trunk, size: Grid, tile: int) -> Iterator[range]:
    """Rows of tokens that are embedded together: as many as have the pixels of a tile, one at least."""
    rows, _ = trunk.grid(size)
    together = max(1, min(tile, tile * tile // size[1]) // trunk.patch)
    for top in range(0, rows, together):
        yield range(top, min(top + together, rows))


def _boxes(grid: Grid, side: int) -> Iterator[Box]:
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            yield Box(top, min(top + side, grid[0]), left, min(left + side, grid[1]))


def _embedded(
    trunk: Trunk, pixels: Pixels, positions: Callable[[Box], Tensor] | None, rows: range, side: int
) -> Iterator[tuple[Box, Tensor]]:
    """Tokens (n, m, C) of a strip, one piece after the other."""
    grid = trunk.grid(pixels.size)
    patch = trunk.patch
    for left in range(0, grid[1], side):
        box = Box(rows.start, rows.stop, left, min(left + side, grid[1]))
        wide = box.grown(trunk.halo, grid)
        strip = pixels.strip(wide.top * patch, wide.bottom * patch)
        seen = pixels.normalised(strip, wide.left * patch, wide.right * patch, trunk.weight)
        tokens = trunk.embed(seen)[box.within(wide)]
        if positions is not None:
            tokens = tokens + positions(box)
        yield box, trunk.norm_pre(tokens)

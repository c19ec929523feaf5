"""Small images that stay in memory: read, shown, and rated into a table."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ._data import Images
from ._data._decode import reason, to_rgb
from ._data.batches import InMemory
from ._data.folder import image_files
from ._data.settings import Augment, Data
from ._data.sources import open_source
from ._run import at_least

__all__ = ["as_pictures", "read_image", "whole_images", "write_table"]


def whole_images(data: Data, size: int | None) -> Images:
    """Both splits in memory, the centre squares at `size` (None: as they are, of the digits).

    Raises:
        ValueError, OSError: the data are not there, or are shards.
    """
    plain = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, smoothing=0.0)
    kept, nothing = replace(data, memory=True), (0.0, 0.0, 0.0)
    source = open_source(kept, plain, size, 1.0, nothing, (1.0, 1.0, 1.0), torch.device("cpu"))
    if not isinstance(source, InMemory):
        raise ValueError("data.root: expected images that fit into memory, got shards; give a folder")
    images, count = source.images, data.num_samples
    return replace(images, train_images=images.train_images[:count], train_labels=images.train_labels[:count])


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """uint8 (B, C, H, W), of one channel or three."""
    arrays = [one[0] if len(one) == 1 else one.permute(1, 2, 0) for one in pixels.cpu()]
    return [Image.fromarray(array.contiguous().numpy()) for array in arrays]


def read_image(path: Path, shape: tuple[int, ...]) -> Tensor | str:
    """uint8 (C, H, W): the centre square, resized; or why there is none."""
    try:
        with Image.open(path) as opened:
            image = to_rgb(opened).convert("L" if shape[0] == 1 else "RGB")
        square = np.array(ImageOps.fit(image, (shape[2], shape[1]), Image.Resampling.BICUBIC))
        return torch.from_numpy(square.reshape(*square.shape[:2], shape[0])).permute(2, 0, 1)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        return reason(error, path)


def write_table(
    source: Path,
    out: Path,
    columns: Sequence[str],
    shape: tuple[int, ...],
    batch_size: int,
    rate: Callable[[Tensor], Sequence[Sequence[str]]],
) -> None:
    """A row for every image of `source`: path, columns, error (why it could not be read).

    Args:
        source: an image, or a folder with all below it.
        out: a .csv file.
        shape: C, H, W of what is rated.
        rate: of uint8 (B, C, H, W), the columns of each.

    Raises:
        ValueError, OSError: a word is wrong, or there is no image.
    """
    if out.suffix != ".csv":
        raise ValueError(f"out: expected a file that ends in .csv, got {out}; rename it")
    at_least(1, batch_size=batch_size)
    files = image_files(source)
    failed = 0
    with torch.inference_mode(), out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", *columns, "error"))
        for start in range(0, len(files), batch_size):
            batch = [(path, read_image(path, shape)) for path in files[start : start + batch_size]]
            good = [image for _, image in batch if isinstance(image, Tensor)]
            rated = iter(rate(torch.stack(good)) if good else ())
            for path, image in batch:
                error = "" if isinstance(image, Tensor) else image
                table.writerow((path, *([""] * len(columns) if error else next(rated)), error))
                failed += bool(error)
    print(f"{out}: {len(files):,} rows, {failed:,} of them with an error")

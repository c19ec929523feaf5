"""From what a recipe says of its data to a source of batches."""

import os

import numpy as np
import torch
from PIL import Image, ImageOps

from . import Images, load_images
from ._decode import reason
from .batches import Files, InMemory, Source
from .folder import decode_all
from .settings import Augment, Data
from .shards import Shards
from .split import Split, is_sharded, open_split

__all__ = ["in_memory", "open_source", "workers"]

LIMIT = 2**30  # bytes of decoded images that are kept in memory unasked


def open_source(
    data: Data,
    augment: Augment,
    size: int | None,
    crop: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    processes: int = 1,
) -> Source:
    """Images in memory, from files or from shards.

    Args:
        size: side of what the network sees; None: as the images are, of a set in memory, else 224.
        crop: share of the resized side that is evaluated.
        mean, std: of each channel, for pixels 0..1; images in memory bring their own.
        processes: that train on this machine.

    Raises:
        ValueError, OSError: the data are not there or not as they must be; one sentence says what to do.
    """
    if data.root == "digits" and not data.reader:
        _no_views_of_single_images(data, augment)
        return InMemory(load_images("digits", size), augment, device, data.num_samples)
    side = size or 224
    if is_sharded(data):
        if data.memory:
            raise ValueError(
                "data.memory: expected none with shards, which are streamed, got True; leave it out"
            )
        return Shards(data, augment, (side, side), crop, mean, std, workers(data, processes), device)
    train = open_split(data, data.split)
    val = open_split(data, data.val_split, train.classes)
    if in_memory(data, augment, 3 * side**2 * (min(len(train), data.num_samples or len(train)) + len(val))):
        _no_views_of_single_images(data, augment)
        return InMemory(_decoded(data, train, val, side), augment, device)
    return Files(train, val, data, augment, (side, side), crop, mean, std, workers(data, processes), device)


def in_memory(data: Data, augment: Augment, size: int) -> bool:
    """Whether images of so many bytes are decoded once."""
    if data.memory is not None:
        return data.memory
    single = augment.auto_augment or augment.color_jitter or augment.scale[0] < 1
    return not single and size <= LIMIT


def workers(data: Data, processes: int) -> int:
    """Processes that decode, for each of `processes` that train here."""
    if data.workers is not None:
        return data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes))


def _no_views_of_single_images(data: Data, augment: Augment) -> None:
    asked = "auto_augment" if augment.auto_augment else "color_jitter" if augment.color_jitter else ""
    if asked:
        raise ValueError(
            f"augment.{asked}: expected none for images in memory, which are changed as whole batches, got "
            f"{getattr(augment, asked)!r}; leave it out or add --data.memory False"
        )


def _decoded(data: Data, train: Split, val: Split, size: int) -> Images:
    """The centre squares of both splits at this size; what cannot be read is listed."""
    if data.num_samples is not None and data.num_samples < len(train):
        train = train.shuffled(data.num_samples)
    skipped: list[dict[str, str]] = []
    pixels, labels = zip(*(_all(split, size, skipped) for split in (train, val)), strict=True)
    return Images(
        train.title, train.classes, pixels[0], labels[0], pixels[1], labels[1], val.title, True, skipped
    )


def _all(split: Split, size: int, skipped: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    labels: dict[int, int] = {}

    def one(position: int) -> torch.Tensor | str:
        try:
            image, labels[position] = split.picture(position)
            square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(square)).permute(2, 0, 1)
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
            return reason(error)

    images, good, failed = decode_all(one, len(split), size, split.title)
    skipped += [{"path": split.name(position), "reason": why} for position, why in failed]
    if not good:
        raise ValueError(
            f"data: expected images that can be read in {split.title}, got none ({skipped[-1]['path']}: "
            f"{skipped[-1]['reason']}); check the files"
        )
    return images, torch.tensor([labels[position] for position in good])

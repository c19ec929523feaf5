"""Batches of images with masks: rescaled crops to learn from, whole images to evaluate."""

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._windows import normalised, resized
from ._decode import reason
from .batches import TRIES, Noted, Plan
from .draws import Part
from .masks import IGNORED, Scenes

__all__ = ["Masked", "Pixels", "crop", "listed", "loader", "read_or_note"]

PIXELS = 2**20  # of the images that are evaluated at a time, at most, unless one has more


@dataclass(frozen=True)
class Masked:
    """Held-out images of one size: inputs uint8 (B, 3, height, width), targets uint8 (B, height, width),
    IGNORED where there is no class, positions (B,)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def crop(
    image: np.ndarray,
    mask: np.ndarray,
    size: tuple[int, int],
    rescale: tuple[float, float],
    hflip: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """A view as float32 (3, *size), normalised, and its mask, uint8 `size`, in EANet's order: a random scale,
    padding at the right and below by 0 and by no class, a random crop, a random mirror image.

    EANet takes its data code from EMANet, dataset.py: bilinear with corners aligned, sizes rounded down,
    masks nearest.
    """
    chance = random.Random(seed)
    low, high = rescale
    factor = low + 0.1 * chance.randint(0, round(10 * (high - low)))
    pixels = normalised(torch.from_numpy(image).permute(2, 0, 1)[None])
    # In hundredths: 0.7 times 10 must not be 6.
    scaled = tuple(max(1, side * round(100 * factor) // 100) for side in mask.shape)
    pixels = resized(pixels, (scaled[0], scaled[1]))[0]
    classes = torch.from_numpy(mask)[None, None].float()
    classes = F.interpolate(classes, scaled, mode="nearest")[0, 0].byte()
    down, right = (max(0, want - side) for want, side in zip(size, scaled, strict=True))
    pixels = F.pad(pixels, (0, right, 0, down))
    classes = F.pad(classes, (0, right, 0, down), value=IGNORED)
    top, left = (chance.randint(0, max(0, side - want)) for want, side in zip(size, scaled, strict=True))
    where = slice(top, top + size[0]), slice(left, left + size[1])
    pixels, classes = pixels[:, *where], classes[where]
    if chance.random() < hflip:
        pixels, classes = pixels.flip(2), classes.flip(1)
    return pixels.contiguous(), classes.contiguous()


class Crops(Dataset[Any]):
    """Views by (position, seed): the seed fixes every random choice. What cannot be read is replaced by the
    next that can (None after TRIES), and comes with its reason."""

    def __init__(
        self, scenes: Scenes, size: tuple[int, int], rescale: tuple[float, float], hflip: float
    ) -> None:
        self.scenes, self.size, self.rescale, self.hflip = scenes, size, rescale, hflip

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, seed = key
        failures: list[tuple[str, str]] = []
        for offset in range(min(TRIES, len(self.scenes))):
            index = (position + offset) % len(self.scenes)
            if (found := read_or_note(self.scenes, index, failures)) is not None:
                image, mask = found
                return *crop(image, mask, self.size, self.rescale, self.hflip, seed), failures
        return None, None, failures


class Whole(Dataset[Any]):
    """Images and masks as they are, or None and the reason."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, position: int) -> Any:
        failures: list[tuple[str, str]] = []
        found = read_or_note(self.scenes, position, failures)
        if found is None:
            return None, None, failures
        image, mask = map(torch.from_numpy, found)
        return image.permute(2, 0, 1).contiguous(), (mask, position), failures


def read_or_note(scenes: Any, index: int, failures: list[tuple[str, str]]) -> Any:
    """What scenes.read(index) gives, or None; then failures have its name and the reason."""
    try:
        with warnings.catch_warnings():  # PIL warns of odd metadata in images that it reads well
            warnings.simplefilter("ignore")
            return scenes.read(index)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        failures.append((scenes.name(index), reason(error)))
        return None


def listed(items: list[Any]) -> tuple[list[Any] | None, list[Any], list[tuple[str, str]]]:
    there = [(image, rest) for image, rest, _ in items if image is not None]
    failures = [failure for *_, failed in items for failure in failed]
    return [image for image, _ in there] or None, [rest for _, rest in there], failures


def loader(samples: Any, keys: Any, workers: int, persistent: bool) -> DataLoader[Any]:
    """Of samples that give an image or None, the rest, and failures; `keys` are the batches."""
    return DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=listed,
        persistent_workers=persistent and workers > 0,
    )


class Pixels:
    """Both splits, decoded by workers."""

    def __init__(
        self,
        train: Scenes,
        val: Scenes,
        size: tuple[int, int],
        rescale: tuple[float, float],
        hflip: float,
        workers: int,
        device: torch.device,
    ) -> None:
        self.train_scenes, self.val_scenes, self.workers, self.device = train, val, workers, device
        self.skipped: list[dict[str, str]] = []
        self._plan = Plan(len(train), 1)
        self._train = loader(Crops(train, size, rescale, hflip), self._plan, workers, True)

    def train(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (B, 3, *size), normalised, and masks (B, *size), on the device."""
        self._plan.set(epoch, update, part)
        noted: Any = Noted(self._train, self.skipped, self.train_scenes.title, part.piece)
        for images, masks in noted:
            yield torch.stack(images).to(self.device), torch.stack(masks).long().to(self.device)

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Masked]:
        """Held-out images; neighbours of one size come together."""
        index = torch.arange(len(self.val_scenes))[rank::world]
        keys = [some.tolist() for some in index.split(batch_size)]
        batches = loader(Whole(self.val_scenes), keys, self.workers, False)
        noted: Any = Noted(batches, self.skipped, self.val_scenes.title, some=world == 1)
        for images, rest in noted:
            items = list(zip(images, rest, strict=True))
            for shape, same in groupby(items, lambda item: item[0].shape):
                group = list(same)
                step = max(1, PIXELS // (shape[1] * shape[2]))
                for start in range(0, len(group), step):
                    few = group[start : start + step]
                    masks, positions = zip(*(rest for _, rest in few), strict=True)
                    yield Masked(
                        torch.stack([image for image, _ in few]).to(self.device),
                        torch.stack(masks).to(self.device),
                        torch.tensor(positions),
                    )

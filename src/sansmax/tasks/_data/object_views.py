"""Batches of images with objects: resized, mirrored, of any sizes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as codes
from torch import Tensor
from torch.utils.data import Dataset

from ...models._detector import Images
from .._recipes.detection import Recipe
from .._windows import normalised
from .batches import TRIES, Noted, Plan
from .crops import loader, read_or_note
from .draws import Part
from .objects import Objects, Truth

__all__ = ["Seen", "Views", "fitting", "resized", "view"]

PIXELS = 2**22  # of the images that are evaluated at a time, at most, unless one has more


@dataclass(frozen=True)
class Seen:
    """Held-out images: what the network takes, their sizes as files (height, width), and positions (B,)."""

    inputs: Images
    sizes: list[tuple[int, int]]
    positions: Tensor

    def __len__(self) -> int:
        return len(self.sizes)


def fitting(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Height and width with the short side `short`, or with the long side `long` where it would be longer;
    the nearest whole pixels."""
    factor = min(short / min(size), long / max(size))
    return max(1, round(factor * size[0])), max(1, round(factor * size[1]))


def resized(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (height, width, 3) -> float32 (3, *size), bilinear with antialiasing, normalised."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    if size != image.shape[:2]:
        scaled = F.interpolate(pixels.float(), size, mode="bilinear", align_corners=False, antialias=True)
        pixels = scaled.round().clamp(0, 255).byte()
    return normalised(pixels)[0]


def view(
    image: np.ndarray, truth: Truth, short_sides: tuple[int, ...], long_side: int, hflip: float, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of one of the short sides, mirrored or not, and its objects without crowds."""
    chance = random.Random(seed)
    height, width = image.shape[:2]
    size = fitting((height, width), chance.choice(short_sides), long_side)
    mirrored = chance.random() < hflip
    pixels = resized(image, size)
    learned = ~truth.crowd
    scale = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float64)
    boxes = (torch.from_numpy(truth.boxes[learned]) * scale).float()
    target = {"labels": torch.from_numpy(truth.labels[learned])}
    if truth.masks is not None:
        chosen = [code for code, wanted in zip(truth.masks, learned, strict=True) if wanted]
        masks = torch.zeros(0, *size, dtype=torch.uint8)
        if chosen:
            drawn = torch.from_numpy(codes.decode(chosen)).permute(2, 0, 1)
            masks = F.interpolate(drawn[None].float(), size, mode="nearest")[0].byte()
        target["masks"] = masks.flip(2) if mirrored else masks
    if mirrored:
        pixels = pixels.flip(2)
        boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], 1)
    whole = (boxes[:, 2:] > boxes[:, :2]).all(1)  # in float32 the thinnest may have become lines
    target = {name: value[whole] for name, value in target.items()}
    return pixels.contiguous(), {**target, "boxes": boxes[whole]}


class _Learned(Dataset[Any]):
    """Views by (position, seed). What cannot be read is replaced by the next that can (None after TRIES), and
    comes with its reason."""

    def __init__(self, objects: Objects, recipe: Recipe) -> None:
        self.objects, self.recipe = objects, recipe

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, seed = key
        failures: list[tuple[str, str]] = []
        for offset in range(min(TRIES, len(self.objects))):
            index = (position + offset) % len(self.objects)
            if (image := read_or_note(self.objects, index, failures)) is not None:
                r = self.recipe
                truth = self.objects.truth(index)
                return *view(image, truth, r.short_sides, r.long_side, r.hflip, seed), failures
        return None, None, failures


class _HeldOut(Dataset[Any]):
    """Images of the evaluation's size by position, or None and the reason."""

    def __init__(self, objects: Objects, recipe: Recipe) -> None:
        self.objects, self.recipe = objects, recipe

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, position: int) -> Any:
        failures: list[tuple[str, str]] = []
        image = read_or_note(self.objects, position, failures)
        if image is None:
            return None, None, failures
        size = fitting(image.shape[:2], self.recipe.evaluation_side, self.recipe.long_side)
        return resized(image, size), (position, image.shape[:2]), failures


class Views:
    """Both splits, decoded by workers; what cannot be used is listed in `skipped`."""

    def __init__(
        self, train: Objects, val: Objects, recipe: Recipe, workers: int, device: torch.device
    ) -> None:
        self.train_objects, self.val_objects, self.recipe = train, val, recipe
        self.workers, self.device = workers, device
        rejected = train.skipped()
        self.skipped = [*rejected, *(one for one in val.skipped() if one not in rejected)]
        self.rejected = len(self.skipped)
        self._plan = Plan(len(train), 1)
        self._train = loader(_Learned(train, recipe), self._plan, workers, True)

    def train(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Images, None]]:
        """Views with their targets, on the device."""
        self._plan.set(epoch, update, part)
        noted: Any = Noted(self._train, self.skipped, self.train_objects.title, part.piece)
        for images, targets in noted:
            moved = [{name: value.to(self.device) for name, value in one.items()} for one in targets]
            yield Images([image.to(self.device) for image in images], moved), None

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Seen]:
        """Held-out images in order, as many at a time as PIXELS allows."""
        index = torch.arange(len(self.val_objects))[rank::world]
        keys = [some.tolist() for some in index.split(batch_size)]
        items = loader(_HeldOut(self.val_objects, self.recipe), keys, self.workers, False)
        noted: Any = Noted(items, self.skipped, self.val_objects.title, some=world == 1)
        for images, rest in noted:
            step = max(1, PIXELS // max(image[0].numel() for image in images))
            for start in range(0, len(images), step):
                few = slice(start, start + step)
                positions, sizes = zip(*rest[few], strict=True)
                moved = [image.to(self.device) for image in images[few]]
                yield Seen(Images(moved), list(sizes), torch.tensor(positions))

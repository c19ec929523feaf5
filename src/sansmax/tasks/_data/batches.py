"""Batches for the loop: images in memory, changed together on the device, or decoded one by one by workers.

A source gives batches of float images, normalised, on the device, with their labels and the boxes that random
erasing fills; which images, and what is done to them, depends on the seed and the position alone (draws.py).
"""

import math
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import Images
from ._decode import middle, reason
from ._posterize import mended
from .draws import Part, draw, generator, order
from .settings import Augment, Data
from .split import Split
from .views import views

__all__ = ["Batch", "Decoded", "Files", "InMemory", "Source", "erasing_box"]

TRIES = 100  # images in a row that cannot be read, after which training stops
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of random erasing, as in timm and DeiT


@dataclass(frozen=True)
class Batch:
    """images (B, C, height, width) float32, normalised; labels (B,); boxes (B, 4): top, left, height, width
    to erase; positions (B,) in the split."""

    images: Tensor
    labels: Tensor
    boxes: Tensor
    positions: Tensor

    @property
    def inputs(self) -> Tensor:
        return self.images

    def __len__(self) -> int:
        return len(self.images)


class Source(Protocol):
    """Training and held-out images for the loop."""

    title: str
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    val_size: int
    split: str  # how the held-out set was chosen, in words
    skipped: list[dict[str, str]]  # images that could not be read: path and reason

    def train(self, epoch: int, update: int, part: Part) -> Iterator[Batch]:
        """This process's pieces of the epoch's updates, from the update with that number in the epoch on."""
        ...

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        """This process's share of the held-out images, in order, each once."""
        ...

    def picture(self, position: int) -> tuple[Image.Image, str] | None:
        """A held-out image, and its name; None where it cannot be looked up."""
        ...


def erasing_box(chance: random.Random, height: int, width: int, probability: float) -> list[int]:
    """top, left, height, width of what random erasing fills (timm's distribution); zeros where nothing is."""
    if chance.random() >= probability:
        return [0, 0, 0, 0]
    for _ in range(10):
        area = chance.uniform(*AREA) * height * width
        aspect = math.exp(chance.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return [chance.randint(0, height - h), chance.randint(0, width - w), h, w]
    return [0, 0, 0, 0]


class InMemory:
    """Images that were decoded once, on the device; views of a whole batch are made in one resampling."""

    def __init__(
        self, images: Images, augment: Augment, device: torch.device, limit: int | None = None
    ) -> None:
        self.images, self.augment, self.device = images, augment, device
        self.title, self.classes, self.split = images.name, images.classes, images.split
        self.skipped = list(images.skipped)
        chosen = slice(None) if limit is None else order(len(images.train_labels), 0, 0)[:limit]
        self._train = images.train_images[chosen].to(device), images.train_labels[chosen].to(device)
        self._val = images.val_images.to(device), images.val_labels.to(device)
        mean, std = images.mean_std()
        self.mean, self.std = tuple(mean.tolist()), tuple(std.tolist())
        self._mean, self._std = mean.to(device)[:, None, None], std.to(device)[:, None, None]
        self.train_size, self.val_size = len(self._train[1]), len(images.val_labels)

    def train(self, epoch: int, update: int, part: Part) -> Iterator[Batch]:
        entries = order(self.train_size, part.seed, epoch, self.augment.repeats)
        for number in range(update, self.train_size // part.batch_size):
            index = entries[number * part.batch_size :][: part.batch_size]
            name = ("view", epoch, number)
            chance = torch.rand(5, part.batch_size, generator=generator(part.seed, *name))
            boxes = torch.zeros(part.batch_size, 4, dtype=torch.int64)
            if self.augment.reprob:
                dice = random.Random(draw(part.seed, *name))
                shape = self._train[0].shape[-2:]
                boxes = torch.tensor(
                    [erasing_box(dice, shape[0], shape[1], self.augment.reprob) for _ in boxes]
                )
            for micro in range(part.accumulate):
                mine = part.rows(torch.arange(part.batch_size), micro)
                pixels, labels = (t[index[mine].to(self.device)] for t in self._train)
                seen = views(self._normalised(pixels), self.augment, chance[:, mine], -self._mean / self._std)
                yield Batch(seen, labels, boxes[mine].to(self.device), index[mine])

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        for index in torch.arange(self.val_size)[rank::world].split(batch_size):
            pixels, labels = (t[index.to(self.device)] for t in self._val)
            yield Batch(self._normalised(pixels), labels, torch.zeros(len(index), 4), index)

    def picture(self, position: int) -> tuple[Image.Image, str] | None:
        pixels = self.images.val_images[position]
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        return Image.fromarray(array.numpy()), f"held-out image {position}"

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self._mean) / self._std


class Decoded(Dataset[Any]):
    """Images of a split as uint8 (3, size, size), by (position, seed): the seed fixes every random choice.

    An image that cannot be read or changed is replaced by the next that can (training; None after TRIES), or
    left out (evaluation): its name and the reason come with the item.
    """

    def __init__(self, split: Split, transform: Any, reprob: float = 0.0, substitute: bool = False) -> None:
        self.split, self.transform, self.reprob, self.substitute = split, transform, reprob, substitute

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, list[int], list[tuple[str, str]]]:
        position, seed = key
        failures = []
        for offset in range(min(TRIES, len(self.split)) if self.substitute else 1):
            index = (position + offset) % len(self.split)
            try:
                with warnings.catch_warnings():  # PIL warns of odd metadata in images that it reads well
                    warnings.simplefilter("ignore")
                    image, label = self.split.picture(index)
                pixels, numbers = seeded(self.transform, image, seed, self.reprob, [label, index])
                return pixels, numbers, failures
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
                failures.append((self.split.name(index), reason(error)))
        return None, [0] * 6, failures


def seeded(
    transform: Any, image: Image.Image, seed: int, reprob: float, numbers: list[int]
) -> tuple[Tensor, list[int]]:
    """A view of the image as uint8 and [*numbers, the box to erase], both drawn from the seed."""
    random.seed(seed)  # timm's transforms draw from all three
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed, for GPUs too, 166 us
    pixels = torch.from_numpy(np.ascontiguousarray(transform(image)))
    box = (
        erasing_box(random.Random(seed), pixels.shape[-2], pixels.shape[-1], reprob)
        if reprob
        else [0, 0, 0, 0]
    )
    return pixels, [*numbers, *box]


def collated(items: list[Any]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
    """Items of Decoded as one batch; None in place of images that are not there."""
    there = [(pixels, numbers) for pixels, numbers, _ in items if pixels is not None]
    failures = [failure for _, _, failed in items for failure in failed]
    if not there:
        return None, torch.zeros(0, 6, dtype=torch.int64), failures
    return (
        torch.stack([pixels for pixels, _ in there]),
        torch.tensor([numbers for _, numbers in there]),
        failures,
    )


class Files:
    """Images that workers decode and change one by one with timm's transforms; the device only normalises.

    Args:
        size: (height, width) of what the network sees.
        crop: share of the resized side that is evaluated.
    """

    def __init__(
        self,
        train: Split,
        val: Split,
        data: Data,
        augment: Augment,
        size: tuple[int, int],
        crop: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int,
        device: torch.device,
    ) -> None:
        if data.num_samples is not None and data.num_samples < len(train):
            train = train.shuffled(data.num_samples)
        self.title, self.classes = train.title, train.classes
        self.split = val.title
        self.mean, self.std, self.device, self.workers = mean, std, device, workers
        self.train_size, self.val_size = len(train), len(val)
        self.skipped: list[dict[str, str]] = []
        self._splits = train, val
        self._plan = Plan(len(train), augment.repeats)
        self._train = self._loader(
            Decoded(train, training_view(augment, size, mean), augment.reprob, substitute=True), self._plan
        )
        self._evaluated = Decoded(val, evaluation_view(size, crop, augment, mean))

    def train(self, epoch: int, update: int, part: Part) -> Iterator[Batch]:
        self._plan.set(epoch, update, part)
        noted = Noted(self._train, self.skipped, self.title, part.piece)
        yield from normalised(noted, self.mean, self.std, self.device)

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        index = torch.arange(self.val_size)[rank::world]
        keys = [[(i, 0) for i in some.tolist()] for some in index.split(batch_size)]
        loader = self._loader(self._evaluated, keys, persistent=False)
        noted = Noted(loader, self.skipped, self.split, some=world == 1)
        return normalised(noted, self.mean, self.std, self.device)

    def picture(self, position: int) -> tuple[Image.Image, str] | None:
        split = self._splits[1]
        return split.picture(position)[0], split.name(position)

    def _loader(self, images: Decoded, keys: Any, persistent: bool = True) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=collated,
            pin_memory=self.device.type == "cuda",
            persistent_workers=persistent and self.workers > 0,
        )


@dataclass
class Noted:
    """The batches of a loader that hold images; what could not be read is noted once in `skipped`.

    Args:
        title: of the set, in words.
        size: images that every batch must hold, in training, where others replace what cannot be read.
        some: whether there must be an image at all.

    Raises:
        ValueError: they are not there.
    """

    loader: Iterable[Any]
    skipped: list[dict[str, str]]
    title: str
    size: int = 0
    some: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        known = {entry["path"] for entry in self.skipped}
        seen = 0
        for images, numbers, failures in self.loader:
            for path, why in failures:
                if path not in known:
                    known.add(path)
                    self.skipped.append({"path": path, "reason": why})
            count = 0 if images is None else len(images)
            seen += count
            if count < self.size:
                raise self._refusal(f"{TRIES} in a row that cannot" if len(failures) >= TRIES else "none")
            if images is not None:
                yield images, numbers
        if self.some and not seen:
            raise self._refusal("none")

    def _refusal(self, got: str) -> ValueError:
        last = " ({path}: {reason})".format(**self.skipped[-1]) if self.skipped else ""
        return ValueError(
            f"data: expected images that can be read in {self.title}, got {got}{last}; check the files"
        )


def normalised(
    batches: Iterable[tuple[Tensor, Tensor]],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterator[Batch]:
    """uint8 images and rows [label, position, box] as batches on the device, the next on its way
    meanwhile."""
    loader: Any = PrefetchLoader(batches, mean=tuple(mean), std=tuple(std), channels=len(mean), device=device)  # pyright: ignore[reportArgumentType]
    for images, numbers in loader:
        yield Batch(images, numbers[:, 0], numbers[:, 2:], numbers[:, 1])


class Plan:
    """The keys of an epoch's pieces for a DataLoader that keeps its workers from epoch to epoch."""

    def __init__(self, count: int, repeats: int) -> None:
        self.count, self.repeats = count, repeats

    def set(self, epoch: int, update: int, part: Part) -> None:
        self.epoch, self.update, self.part = epoch, update, part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.part
        entries = order(self.count, part.seed, self.epoch, self.repeats)
        for number in range(self.update, self.count // part.batch_size):
            positions = torch.arange(number * part.batch_size, (number + 1) * part.batch_size)
            for micro in range(part.accumulate):
                mine = part.rows(positions, micro)
                yield [
                    (image, draw(part.seed, "view", self.epoch, at))
                    for image, at in zip(entries[mine].tolist(), mine.tolist(), strict=True)
                ]

    def __len__(self) -> int:
        return (self.count // self.part.batch_size - self.update) * self.part.accumulate


def training_view(augment: Augment, size: tuple[int, int], mean: Sequence[float]) -> Any:
    """timm's training transform, up to uint8."""
    transform = create_transform(
        size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment or None,
        interpolation=augment.interpolation,
        mean=tuple(mean),
        use_prefetcher=True,
    )
    return mended(transform)


def evaluation_view(size: tuple[int, int], crop: float, augment: Augment, mean: Sequence[float]) -> Any:
    """timm's evaluation transform, up to uint8."""
    kind = "bicubic" if augment.interpolation == "random" else augment.interpolation
    transform: Any = create_transform(
        size, crop_pct=crop, interpolation=kind, mean=tuple(mean), use_prefetcher=True
    )
    transform.transforms.insert(0, middle)
    return transform

"""Images with the boxes, and perhaps the masks, of their objects."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .._recipes.detection import ObjectData
from ._decode import to_rgb
from .draws import order

__all__ = ["Files", "Objects", "Rejected", "Truth", "clipped", "name_of", "open_objects", "truth_of"]

RLE = dict[str, Any]  # COCO's compressed run-length code: {"size": [height, width], "counts": bytes}


@dataclass(frozen=True)
class Truth:
    """The objects of an image.

    Attributes:
        boxes: float64 (n, 4), x1 y1 x2 y2 in the image's pixels, from its upper left corner.
        labels: int64 (n,), from 0.
        crowd: bool (n,): not one object but a region of several, or one too hard: neither learned nor missed.
        areas: float64 (n,), in pixels, by which the evaluator tells small objects from large ones.
        masks: of each its code; None where the set has none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: list[RLE] | None = None


class Reader(Protocol):
    """Images; it goes to the processes that decode."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> np.ndarray:
        """uint8 (height, width, 3)."""
        ...


@dataclass(frozen=True)
class Files:
    """Of a folder; `sizes` (height, width) as the annotations have them."""

    root: Path
    paths: list[Path]
    sizes: list[tuple[int, int]]

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def read(self, index: int) -> np.ndarray:
        with warnings.catch_warnings(), Image.open(self.paths[index]) as opened:
            warnings.simplefilter("ignore")  # PIL warns of odd metadata in images that it reads well
            image = np.array(to_rgb(opened))
        if image.shape[:2] != self.sizes[index]:
            height, width = self.sizes[index]
            raise ValueError(
                f"image of {image.shape[1]}x{image.shape[0]} pixels, boxes for one of {width}x{height}"
            )
        return image


@dataclass(frozen=True)
class Objects:
    """A split.

    Attributes:
        classes: number and name of each, "18 dog": a detection is told with the number.
        sizes: (height, width) of the images.
        rejected: of objects that cannot be used, the image's position, which they are, and why.
        positions: of the split's images in all that precedes.
    """

    title: str
    classes: list[str]
    reader: Reader
    truths: list[Truth]
    sizes: list[tuple[int, int]]
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    positions: np.ndarray = field(default_factory=lambda: np.arange(0))

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        return self.reader.name(int(self.positions[index]))

    def read(self, index: int) -> np.ndarray:
        """uint8 (height, width, 3).

        Raises:
            Exception: of many kinds, where it cannot be read or has another size than its boxes are for.
        """
        return self.reader.read(int(self.positions[index]))

    def truth(self, index: int) -> Truth:
        return self.truths[int(self.positions[index])]

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[int(self.positions[index])]

    def skipped(self) -> list[dict[str, str]]:
        """Objects of the split's images that cannot be used."""
        own = set(self.positions.tolist())
        return [
            {"path": f"{self.reader.name(i)}, {which}", "reason": why}
            for i, which, why in self.rejected
            if i in own
        ]

    def first(self, count: int | None) -> "Objects":
        """The first `count` of a shuffle that is always the same."""
        if count is None or count >= len(self):
            return self
        return replace(self, positions=self.positions[order(len(self), 0, 0)[:count].numpy()])


class Rejected(ValueError):
    """Why an object cannot be used."""


def clipped(box: Any, height: int, width: int) -> list[float]:
    """x1 y1 x2 y2 within the image.

    Raises:
        Rejected: these are no four finite numbers, or nothing of the box is in the image.
    """
    values = np.asarray(box, np.float64) if _numbers(box) else np.zeros(0)
    if values.shape != (4,) or not np.isfinite(values).all():
        raise Rejected(f"its box is {box}, not four finite numbers")
    x1, x2 = values[[0, 2]].clip(0, width)
    y1, y2 = values[[1, 3]].clip(0, height)
    if x1 >= x2 or y1 >= y2:
        raise Rejected(
            f"its box, x {values[0]:g} to {values[2]:g}, y {values[1]:g} to {values[3]:g}, has no area in "
            f"the image of {width}x{height}"
        )
    return [x1, y1, x2, y2]


def _numbers(box: Any) -> bool:
    return isinstance(box, list | tuple) and all(isinstance(value, int | float) for value in box)


def truth_of(rows: list[tuple[list[float], int, bool, float, RLE | None]], masks: bool) -> Truth:
    """Of rows of box, label, crowd, area and mask."""
    boxes, labels, crowd, areas, codes = zip(*rows, strict=True) if rows else ((),) * 5
    return Truth(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        np.array(areas, np.float64),
        list(codes) if masks else None,
    )


def name_of(label: str) -> str:
    """Of "18 dog" the dog."""
    return label.partition(" ")[2]


def open_objects(data: ObjectData, masks: bool) -> tuple[Objects, Objects]:
    """Training and held-out split, with masks where they are wanted.

    Raises:
        ValueError, OSError: nothing is there, it is not laid out as it must be, or masks are wanted and there
            are none; one sentence says what to do.
    """
    read: Callable[[Path, str, bool], Objects]
    root = Path(data.root).expanduser()
    if data.root == "digits":
        from .digit_objects import digits

        train, val = digits(data.split, data.val_split, masks)
    else:
        from . import coco, voc

        if not root.is_dir():
            raise NotADirectoryError(
                f"data.root: expected a folder, got {'a file' if root.is_file() else 'nothing'} at {root}; "
                "give one with annotations/instances_<split>.json, or VOCdevkit/VOC2012"
            )
        folder = voc.folder(root)
        read, where = (voc.read, folder) if folder else (coco.read, root)
        train = read(where, data.split, masks)
        val = train if data.val_split == data.split else read(where, data.val_split, masks)
        if train.classes != val.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))
            raise ValueError(
                f"data.val_split: expected the categories of {data.split}, got {', '.join(odd[:5])} in only "
                "one of them; mend the files"
            )
    return train.first(data.num_samples), val.first(data.val_samples)

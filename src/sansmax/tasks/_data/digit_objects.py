"""The digits of the pictures that every machine has, as objects."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from faster_coco_eval import mask as codes

from .digit_scenes import SIDE, scenes
from .objects import Objects, truth_of

__all__ = ["digits"]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class _Drawn:
    split: str
    images: list[np.ndarray]

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def digits(split: str, val_split: str, masks: bool) -> tuple[Objects, Objects]:
    """digit_scenes' pictures of 64 pixels with one to three digits, one in a quarter at most."""
    found = dict(zip(("train", "val"), scenes(), strict=True))
    parts = []
    for name in (split, val_split):
        if name not in found:
            raise ValueError(
                f"data.split: expected train or val of the digits, got {name!r}; use one of them"
            )
        pictures = found[name]
        images, values = zip(*map(pictures.read, range(len(pictures))), strict=True)
        parts.append(
            Objects(
                pictures.title,
                [f"{i + 1} {word}" for i, word in enumerate(NAMES)],
                _Drawn(name, list(images)),
                [truth_of(_rows(mask), masks) for mask in values],
                [(SIDE, SIDE)] * len(pictures),
                positions=np.arange(len(pictures)),
            )
        )
    return parts[0], parts[1]


def _rows(mask: np.ndarray) -> list:
    rows, half = [], SIDE // 2
    for y, x in product((0, half), repeat=2):
        own = np.zeros_like(mask)
        own[y : y + half, x : x + half] = mask[y : y + half, x : x + half]
        if not own.any():
            continue
        code = codes.encode(np.asfortranarray((own > 0).astype(np.uint8)))
        left, top, width, height = map(float, codes.toBbox(code))
        box = [left, top, left + width, top + height]
        rows.append((box, int(own.max()) - 1, False, float((own > 0).sum()), code))
    return rows

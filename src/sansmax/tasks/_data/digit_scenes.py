"""Pictures that every machine has: scikit-learn's handwritten digits, written on its two photographs."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images

from .draws import generator
from .masks import Scenes

__all__ = ["scenes"]

SIDE = 64
COUNTS = {"train": 1200, "val": 200}
CLASSES = ["photograph", *map(str, range(10))]


@dataclass(frozen=True)
class _Drawn:
    split: str
    images: np.ndarray  # uint8 (count, SIDE, SIDE, 3)
    masks: np.ndarray  # uint8 (count, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[index], self.masks[index]


def scenes() -> tuple[Scenes, Scenes]:
    """Training and held-out pictures of 64 pixels: a piece of a photograph with up to three digits on it,
    in any colour, each 24 to 32 pixels high. Classes: the photograph, and the ten digits.

    Digits and pieces of the photographs (their left four fifths and the rest) are in one split only.
    """
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    digits = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    photos = [torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images]
    held = torch.arange(len(digits)) % 5 == 4
    found = []
    for split, count in COUNTS.items():
        own = (held if split == "val" else ~held).nonzero()[:, 0]
        cut = [int(0.8 * photo.shape[2]) for photo in photos]
        views = [p[:, :, c:] if split == "val" else p[:, :, :c] for p, c in zip(photos, cut, strict=True)]
        drawn = [_scene(views, digits, labels, own, generator(0, split, i)) for i in range(count)]
        images, masks = (np.stack(x) for x in zip(*drawn, strict=True))
        meaning = np.full(256, 254, np.uint8)
        meaning[: len(CLASSES)] = np.arange(len(CLASSES))
        title = "scikit-learn's digits on its photographs" if split == "train" else f"{count} others"
        found.append(Scenes(title, CLASSES, _Drawn(split, images, masks), meaning, np.arange(count)))
    return found[0], found[1]


def _scene(
    photos: list[torch.Tensor],
    digits: torch.Tensor,
    labels: np.ndarray,
    own: torch.Tensor,
    chance: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    def below(count: int) -> int:
        return int(torch.randint(count, (1,), generator=chance))

    photo = photos[below(len(photos))]
    top, left = (below(side - SIDE + 1) for side in photo.shape[1:])
    image = photo[:, top : top + SIDE, left : left + SIDE].float()
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    # One in each of three quarters at most, so that none covers another.
    for corner in torch.randperm(4, generator=chance)[: 1 + below(3)].tolist():
        index = int(own[below(len(own))])
        size = 24 + below(9)
        ink = F.interpolate(digits[index : index + 1], (size, size), mode="bicubic")[0, 0].clamp(0, 1)
        y, x = (32 * half + below(33 - size) for half in divmod(corner, 2))
        colour = 255 * torch.rand(3, generator=chance)
        where = slice(y, y + size), slice(x, x + size)
        image[:, *where] += ink * (colour[:, None, None] - image[:, *where])
        mask[where][ink > 0.5] = int(labels[index]) + 1
    return image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), mask.numpy()

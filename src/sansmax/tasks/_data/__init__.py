"""Labelled images in memory, from the bundled digits or from a folder."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Images", "load_images"]


@dataclass(frozen=True)
class Images:
    """A training and a held-out set, decoded once.

    images: uint8 (count, channels, size, size); labels: int64 (count,), indices into `classes`.
    """

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    split: str  # how the held-out set was chosen, in words
    photos: bool  # a mirrored or cropped image keeps its class
    skipped: list[dict[str, str]] = field(default_factory=list)  # unreadable images: path and reason

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training set, for values in 0..1."""
        # Integer sums in blocks: a float copy of all images would take four times their memory.
        total = square = torch.zeros((), dtype=torch.float64)
        count = self.train_images[:, 0].numel()
        for block in self.train_images.split(1024):
            values = block.transpose(0, 1).flatten(1).double() / 255
            total, square = total + values.sum(1), square + values.square().sum(1)
        mean = total / count
        variance = square / count - mean**2
        return mean.float(), variance.clamp(min=1e-4).sqrt().float()


def load_images(data: str = "digits", img_size: int | None = None) -> Images:
    """`data`: "digits", or the path of an image folder ("./digits" for a folder of that name).

    Raises:
        ValueError, OSError: the folder is missing, unreadable or not laid out as one folder a class.
    """
    if data == "digits":
        from .digits import load

        return load(img_size)
    from .folder import load

    return load(data, img_size)

"""The handwritten digits that scikit-learn brings along: 1,797 grey images of 8 x 8 pixels, no download.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998),
written by 13 people. Of every class each fourth image, in the order of the file, is held out: 1,352 images to
train, 445 to test.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from . import Images

__all__ = ["load"]

EVERY = 4


def load(img_size: int | None = None) -> Images:
    """The digits at img_size (default: their own 8 pixels)."""
    pixels, target = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).view(-1, 1, 8, 8) * (255 / 16)
    labels = torch.as_tensor(target).long()
    if img_size is not None and img_size != images.shape[-1]:
        images = F.interpolate(images, (img_size, img_size), mode="bilinear", antialias=True)
    images = images.round().clamp(0, 255).to(torch.uint8)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[EVERY - 1 :: EVERY]] = True
    return Images(
        name="digits (scikit-learn)",
        classes=[str(label) for label in range(10)],
        train_images=images[~held_out],
        train_labels=labels[~held_out],
        val_images=images[held_out],
        val_labels=labels[held_out],
        split=f"each {EVERY}th image of every class, in the order of the file, is held out",
        photos=False,
    )

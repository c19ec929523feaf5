"""What is done to a whole batch at once, on its device: views, erasing, mixing."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from .draws import draw, generator
from .settings import Augment

__all__ = ["Mixing", "erase", "views"]


def views(images: Tensor, augment: Augment, chance: Tensor, black: Tensor) -> Tensor:
    """Another view of each image, in one resampling of the whole batch: no loop over images.

    Args:
        images: float (B, C, height, width).
        augment: scale and ratio crop, hflip mirrors, shift moves.
        chance: (5, B) numbers from 0 to 1 that say how.
        black: (C, 1, 1), what lies outside the image.
    """
    batch = len(images)
    area, ratio, x, y, mirror = chance
    x, y = 2 * x - 1, 2 * y - 1
    low, high = augment.scale
    area = low + (high - low) * area
    ratio = augment.ratio[0] * (augment.ratio[1] / augment.ratio[0]) ** ratio
    if low == 1:
        width = height = torch.ones(batch)
    else:
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = x * (1 - width + 2 * augment.shift)
    y = y * (1 - height + 2 * augment.shift)
    width = torch.where(mirror < augment.hflip, -width, width)
    zero = torch.zeros(batch)
    theta = torch.stack([width, zero, x, zero, height, y], 1).view(batch, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black


def erase(images: Tensor, boxes: Tensor, seed: int, update: int) -> Tensor:
    """The boxes (B, 4) of top, left, height, width filled with normal noise, one field for the whole
    update."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    top, left, height, width = boxes.to(images.device).unbind(1)
    down = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    noise = torch.randn(images.shape[1:], generator=generator(seed, "erase", update))
    return torch.where((down[:, :, None] & across[:, None, :])[:, None], noise.to(images), images)


class Mixing:
    """Mixup and cutmix of timm, and label smoothing: one draw for all pieces of an update, in every
    process."""

    def __init__(self, augment: Augment, classes: int) -> None:
        self.smoothing, self.classes = augment.smoothing, classes
        self._mix = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix_prob,
            switch_prob=augment.mix_switch,
            label_smoothing=augment.smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int, update: int) -> tuple[Tensor, Tensor]:
        """Mixed images (changed in place) and targets (B, classes)."""
        before = np.random.get_state()
        np.random.seed(draw(seed, "mix", update))
        try:
            return self._mix(images, labels)
        finally:
            np.random.set_state(before)

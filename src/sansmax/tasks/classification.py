"""Which class an image belongs to: batches, augmentation, loss, metric."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ._data import Images

__all__ = ["Classification", "augment"]

AREA = (0.35, 1.0)  # share of a photo that a random crop keeps
RATIO = (3 / 4, 4 / 3)  # its width over its height
SHIFT = (
    1 / 16
)  # of the side, each way, for images that may not be mirrored: half a pixel of the digits' eight


class Classification:
    """Cross-entropy on images in memory; inputs are normalised by the training set's mean and deviation.

    Args:
        images: see sansmax.tasks._data.
        device: where batches are made; the images themselves stay on the CPU.
        label_smoothing: of the training loss.
    """

    score = "accuracy"

    def __init__(
        self, images: Images, device: str | torch.device = "cpu", label_smoothing: float = 0.1
    ) -> None:
        self.images, self.device, self.label_smoothing = images, torch.device(device), label_smoothing
        self.mean, self.std = (t.to(self.device)[:, None, None] for t in images.mean_std())
        self.train_size, self.val_size = len(images.train_labels), len(images.val_labels)

    def train_batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented float32 images (B, C, size, size) and labels (B,) of these training images."""
        pixels, labels = self._take(self.images.train_images, self.images.train_labels, index)
        return augment(self.normalised(pixels), self.images.photos, generator, self._black()), labels

    def val_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The held-out images of these positions, as they are, and labels."""
        pixels, labels = self._take(self.images.val_images, self.images.val_labels, index)
        return self.normalised(pixels), labels

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, size, size) as float32 with the training set's mean 0 and deviation 1."""
        return (pixels.float() / 255 - self.mean) / self.std

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits (B, classes) and labels (B,)."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def metric(self) -> Metric:
        """Share of the images whose highest logit is their class."""
        return MulticlassAccuracy(len(self.images.classes), average="micro").to(self.device)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Class indices (B,)."""
        return outputs.argmax(1)

    def _take(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return images[index].to(self.device), labels[index].to(self.device)

    def _black(self) -> Tensor:
        return -self.mean / self.std


def augment(images: Tensor, photos: bool, generator: torch.Generator, black: Tensor) -> Tensor:
    """Another view of each image, in one resampling of the whole batch: no loop over images.

    Args:
        images: float (B, C, height, width).
        photos: True crops 35 to 100 % of the area at ratios 3:4 to 4:3 and mirrors every other image; False
            shifts by up to 1/16 of the side.
        generator: on the CPU, so that all devices draw the same views.
        black: (C, 1, 1), what lies outside the image.
    """
    batch = len(images)
    area, ratio, x, y, mirror = torch.rand(5, batch, generator=generator)
    x, y = 2 * x - 1, 2 * y - 1
    if photos:
        area = AREA[0] + (AREA[1] - AREA[0]) * area
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x, y = x * (1 - width), y * (1 - height)
        width = torch.where(mirror < 0.5, -width, width)
    else:
        width = height = torch.ones(batch)
        x, y = 2 * SHIFT * x, 2 * SHIFT * y
    zero = torch.zeros(batch)
    theta = torch.stack([width, zero, x, zero, height, y], 1).view(batch, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black

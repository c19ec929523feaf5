"""What a network of segmentation makes of an image: at several scales, mirrored, in windows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

__all__ = ["Look", "normalised", "resized"]


@dataclass(frozen=True)
class Look:
    """How images are looked at.

    Attributes:
        scales: factors of the image's size, each rounded down.
        flip: the mirror image too.
        window, stride: side of square windows, and pixels from one to the next; None: the image whole.
        output_stride: of a network that wants sides of 1 modulo it, to which images are padded at the right
            and below by 0 after the normalisation (EANet); None: images as they are.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    stride: int | None = None
    output_stride: int | None = None

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """uint8 images (B, 3, height, width) -> logits (B, classes, height, width), float32: the mean over
        scales and mirror images.

        The published test of EANet adds them up, which has the same largest class.
        """
        pixels = normalised(images)
        size = images.shape[2], images.shape[3]
        total = torch.zeros(())
        for mirrored in (False, True)[: 1 + self.flip]:
            for scale in self.scales:
                height, width = (max(1, int(scale * side)) for side in size)
                seen = resized(pixels.flip(3) if mirrored else pixels, (height, width))
                if self.output_stride:
                    seen = F.pad(
                        seen, (0, -(width - 1) % self.output_stride, 0, -(height - 1) % self.output_stride)
                    )
                out = resized(network(seen).float()[..., :height, :width], size)
                total = total.to(out) + (out.flip(3) if mirrored else out)
        return total / (len(self.scales) * (1 + self.flip))

    def bands(self, network: nn.Module, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """uint8 images (B, 3, height, width), on any device -> (top, logits (B, classes, rows, width)) from
        the top to the bottom.

        Of windows, at most one row is held, so that memory grows with the width of an image alone.
        """
        height, width = images.shape[2:]
        device = next(network.parameters()).device
        if self.window is None or max(height, width) <= self.window:
            yield 0, self.logits(network, images.to(device))
            return
        step = self.stride or -(-2 * self.window // 3)
        tall, wide = min(self.window, height), min(self.window, width)
        tops, lefts = _starts(height, tall, step), _starts(width, wide, step)
        kept = count = torch.zeros(())
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            for left in lefts:
                part = images[:, :, top : top + tall, left : left + wide]
                out = self.logits(network, part.to(device))
                if not kept.ndim:
                    kept = out.new_zeros(*out.shape[:2], tall, width)
                    count = out.new_zeros(tall, width)
                kept[..., left : left + wide] += out
                count[:, left : left + wide] += 1
            done = following - top
            yield top, kept[:, :, :done] / count[:done]
            kept, count = (F.pad(x[..., done:, :], (0, 0, 0, done)) for x in (kept, count))


def normalised(images: Tensor) -> Tensor:
    """uint8 (..., 3, height, width) -> float32, by ImageNet's mean and deviation."""
    mean, std = (
        torch.tensor(x, device=images.device)[:, None, None]
        for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (images.float() / 255 - mean) / std


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinearly, corner on corner."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def _starts(side: int, window: int, step: int) -> list[int]:
    """Of windows; the last ends with the image."""
    return [*range(0, side - window, step), side - window]

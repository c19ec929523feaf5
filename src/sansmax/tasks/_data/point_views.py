"""What the network sees of clouds: so many of their points, changed for training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._recipes.points import PointAugment
from .points import Share

__all__ = ["View", "changed", "view"]


@dataclass(frozen=True)
class View:
    """points (B, N, 3); parts (B, N), -1 where a cloud has fewer points; mask (B, N), True for points, or
    None where all are; labels (B,)."""

    points: Tensor
    parts: Tensor
    mask: Tensor | None
    labels: Tensor


def view(share: Share, index: Tensor, count: int, scores: Tensor | None, first: bool = False) -> View:
    """At most `count` points of every cloud.

    Args:
        index: (B,), which clouds.
        scores: (B or 1, at least the most points of a cloud): points are taken, and stand, in the order of
            these; None: as they are.
        first: order the first `count` points alone.
    """
    counts = share.counts[index]
    width = min(count, int(counts.max()))
    mask = torch.arange(width) < counts[:, None]
    if scores is None:
        places = torch.arange(width).expand(len(index), -1)
    else:
        limit = counts.clamp(max=count) if first else counts
        wide = int(limit.max())
        ranked = scores[:, :wide].expand(len(index), -1).masked_fill(torch.arange(wide) >= limit[:, None], 2)
        places = ranked.argsort(dim=1, stable=True)[:, :width]
    at = share.starts[index][:, None] + torch.where(mask, places, 0)
    parts = share.parts[at].masked_fill(~mask, -1)
    return View(share.xyz[at], parts, None if mask.all() else mask, share.labels[index])


def changed(seen: View, augment: PointAugment, chance: torch.Generator, mine: Tensor, batch: int) -> View:
    """For training: dropout, rotation, scale, shift and noise, in this order.

    Args:
        mine: (B,), rows of the whole batch that `seen` holds; every number is drawn for the whole batch, so
            that pieces of it see what the whole would.
        batch: clouds of the whole batch.
    """
    xyz, parts = seen.points, seen.parts
    width = xyz.shape[1]
    if augment.dropout:
        share = torch.rand(batch, 1, generator=chance)[mine] * augment.dropout
        drop = torch.rand(batch, width, generator=chance)[mine] <= share
        if seen.mask is not None:
            drop &= seen.mask
        xyz = torch.where(drop[..., None], xyz[:, :1], xyz)
        parts = torch.where(drop, parts[:, :1], parts)
    if augment.rotation != "none":
        xyz = xyz @ _rotations(torch.randn(batch, 4, generator=chance)[mine], augment).mT
    low, high = augment.scale
    xyz = xyz * (low + (high - low) * torch.rand(batch, 1, 3, generator=chance)[mine])
    xyz = xyz + augment.translate * (2 * torch.rand(batch, 1, 3, generator=chance)[mine] - 1)
    if augment.jitter:
        noise = augment.jitter * torch.randn(batch, width, 3, generator=chance)[mine]
        xyz = xyz + noise.clamp(-augment.clip, augment.clip)
    return View(xyz, parts, seen.mask, seen.labels)


def _rotations(q: Tensor, augment: PointAugment) -> Tensor:
    """(B, 3, 3) from normal numbers (B, 4): quaternions that are uniform on the sphere, or, for "z", on the
    circle of those about the up axis."""
    if augment.rotation == "z":
        keep = torch.zeros(4)
        keep[[0, 1 + "xyz".index(augment.up)]] = 1
        q = q * keep
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, 1) for row in rows], 1)

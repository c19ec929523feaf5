"""Images out of a generator of images: their noise, the way from one to another, what is drawn of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["as_bytes", "between", "noises", "samples"]


def as_bytes(images: Tensor) -> Tensor:
    """-1 to 1 -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def noises(count: int, dim: int, chance: torch.Generator, truncation: float | None = None) -> Tensor:
    """Standard normal (count, dim), of values within +-truncation alone."""
    if truncation is None:
        return torch.randn(count, dim, generator=chance)
    share = math.erf(truncation / math.sqrt(2))
    uniform = torch.rand(count, dim, generator=chance, dtype=torch.float64)
    return (math.sqrt(2) * torch.erfinv(share * (2 * uniform - 1))).float()


def between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """(N, Z), (N, Z) -> (N, steps, Z) on the great circle through both, from the first to the last."""
    angle = torch.acos(F.cosine_similarity(first, last, dim=1))[:, None, None]
    share = torch.linspace(0, 1, steps)[:, None]
    weights = [torch.sin(part * angle) / torch.sin(angle) for part in (1 - share, share)]
    return weights[0] * first[:, None] + weights[1] * last[:, None]


@torch.inference_mode()
def samples(
    maker: Any,
    count: int,
    kinds: Sequence[int],
    seed: int,
    truncation: float | None = None,
    steps: int | None = None,
) -> Tensor:
    """uint8 images, class by class; with steps: row by row.

    Args:
        maker: a Generator in eval mode.
        count: of every class, or in all where there are none; with steps: rows.
        kinds: classes.
        steps: images from a noise to another, and from each of the classes, in turn, to the next.
    """
    device = maker.stem.bias.device
    chance = torch.Generator().manual_seed(seed)
    total = count if steps else count * max(1, len(kinds))
    noise = noises(total, maker.latent_dim, chance, truncation)
    y: Tensor | None = torch.tensor(kinds).repeat_interleave(count) if kinds else None
    if steps:
        noise = between(noise, noises(total, maker.latent_dim, chance, truncation), steps).flatten(0, 1)
        if kinds:
            known = F.one_hot(torch.tensor(kinds), maker.blocks[0].norm1.gain.num_embeddings).float()
            turn, share = torch.arange(count), torch.linspace(0, 1, steps)[:, None]
            first, last = (known[(turn + i) % len(kinds)][:, None] for i in (0, 1))
            y = ((1 - share) * first + share * last).flatten(0, 1)
    made = [
        maker(z.to(device), None if y is None else part.to(device))
        for z, part in zip(noise.split(256), (noise if y is None else y).split(256), strict=True)
    ]
    return as_bytes(torch.cat(made))

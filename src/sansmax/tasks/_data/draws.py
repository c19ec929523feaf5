"""Chance as a function of names: what is drawn depends on the seed and on what it is drawn for, on nothing
else.

So a run needs no state of any generator to go on: the images of an update, their views and their mixing
follow from the seed and the number of the update, in any process and after any interruption.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part", "draw", "generator", "order"]


def draw(seed: int, *what: str | int) -> int:
    """A seed of 32 bits, a hash of the run's seed and of what it is for."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=4).digest(), "little")


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A generator on the CPU, begun with `draw`."""
    return torch.Generator().manual_seed(draw(seed, *what))


def order(count: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Which image stands at each of the epoch's `count` positions; `repeats` views of one follow each other.

    With repeats an epoch holds the first count / repeats images of its shuffle (repeated augmentation, as in
    timm's RepeatAugSampler).
    """
    images = torch.randperm(count, generator=generator(seed, "order", epoch))
    return images.repeat_interleave(repeats)[:count] if repeats > 1 else images


@dataclass(frozen=True)
class Part:
    """Which share of every update this process computes, and in how many pieces.

    An update's batch is dealt out in pairs (i, batch_size - 1 - i), which mixup and cutmix combine, so that
    any number of processes and of accumulated pieces sees the same pairs; neighbours, which repeated
    augmentation fills with views of one image, go to different pieces.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        pieces = self.accumulate * self.world
        if pieces > 1 and self.batch_size % (2 * pieces):
            raise ValueError(
                f"batch_size: expected a multiple of {2 * pieces}, an even number of images for each of "
                f"{self.world} processes and {self.accumulate} accumulated batches, got {self.batch_size}; "
                "change it"
            )

    @property
    def piece(self) -> int:
        """Images of one forward pass."""
        return self.batch_size // (self.accumulate * self.world)

    def rows(self, batch: Tensor, micro: int) -> Tensor:
        """The entries of an update's batch (batch_size, ...) that belong to the piece `micro` of this
        process."""
        pieces, mine = self.accumulate * self.world, micro * self.world + self.rank
        if pieces == 1:
            return batch
        half = len(batch) // 2
        front, back = batch[:half][mine::pieces], batch[half:].flip(0)[mine::pieces]
        return torch.cat([front, back.flip(0)])

"""DeiT, the softmax baseline."""

from dataclasses import replace

from ..train.recipe import Recipe
from ._imagenet import DEIT

__all__ = ["deit"]

RUNS = {f"deit_{size}": (f"deit_{size}_patch16_224",) for size in ("tiny", "small", "base")}


def deit(network: str) -> Recipe:
    """DeiT with softmax attention on ImageNet-1k, without distillation: the baseline of SimA-DeiT and AFT.

        sansmax train deit_small --data.root imagenet

    Cost: one node of 4 GPUs with 256 images each (tiny, small), two nodes of 8 (base); hours: not stated.
    To reach: top-1 72.2 (tiny), 79.9 (small), 81.8 (base), the README's.

    Source: published code facebookresearch/deit, main.py and README.
    Differences:
    - The published loop steps the schedule after epoch e with e itself, so epochs 0 and 1 both run at 1e-6.
      Here epoch e has the rate of e, and epoch 0 alone runs at 1e-6.
    - The 10 cool-down epochs that main.py asks for are never run, there or here.
    - The moving average (0.99996) is kept and never evaluated, there or here.
    - Seeds: the published one is 0 plus the number of the process.
    """
    return replace(DEIT, model=network)

"""SimA in CvT."""

from dataclasses import replace

from ..train.recipe import Recipe
from ._imagenet import AUGMENT, DEIT

__all__ = ["sima_cvt"]

RUNS = {f"sima_cvt_{blocks}": (f"sima_cvt_{blocks}",) for blocks in (13, 21)}


def sima_cvt(network: str) -> Recipe:
    """SimA in CvT on ImageNet-1k, with CvT's recipe.

        sansmax train sima_cvt_13 --data.root imagenet

    Cost: not stated; CvT's README trains CvT-13 on 8 GPUs with 256 images each.
    To reach: not published; the abstract says "on-par" with CvT, whose top-1 is 81.6 (13) and 82.5 (21).

    Source: published code microsoft/CvT, cvt-13-224x224.yaml and tools/train.py. Of SimA-CvT nothing was
    published but that SimA takes the place of softmax.
    Differences:
    - The 10 cool-down epochs of the yaml are never run, there or here. The schedule there steps with e + 1
      after epoch e, which is what happens here.
    Assumed:
    - that the authors of SimA kept CvT's recipe: DeiT's without repeated augmentation and moving average.
    - batch 2048: the yaml has 256 a GPU and a rate of 2.5e-4 a GPU, the number of GPUs is the README's.
    - the same for CvT-21, whose yaml was not read.
    """
    return replace(
        DEIT,
        model=network,
        batch_size=2048,
        augment=AUGMENT,
        optim=replace(DEIT.optim, lr=2.5e-4, lr_batch=256, ema=0.0, evaluate_ema=True),
    )

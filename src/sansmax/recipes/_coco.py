"""What the papers' runs on COCO have in common."""

from typing import Any

from ..tasks._recipes.detection import ObjectData, Recipe
from ..train.recipe import Optim

__all__ = ["coco"]

MILESTONES = {12: (8, 11), 36: (27, 33)}  # of 1x and 3x
WARMUP = 500  # updates, of 7,330 in an epoch


def coco(epochs: int, opt: str, lr: float, weight_decay: float, **words: Any) -> Recipe:
    """mmdetection's 1x (12 epochs) and 3x (36) on COCO's train2017: 16 images an update, the short side 800
    pixels and the long one at most 1,333, a warm-up of 500 updates, a tenth of the rate at each milestone."""
    return Recipe(
        long_side=1333,
        eval_side=800,
        freeze_norm=True,
        epochs=epochs,
        batch_size=16,
        data=ObjectData(root="coco"),
        optim=Optim(
            opt=opt,
            lr=lr,
            lr_batch=None,
            weight_decay=weight_decay,
            sched="multistep",
            milestones=MILESTONES[epochs],
            per="update",
            warmup=WARMUP / 7330,
            warmup_lr=lr / 1000,
            min_lr=0.0,
        ),
        **words,
    )

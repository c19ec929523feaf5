"""A few images in COCO's layout are learned by heart."""

from ..tasks._recipes.detection import ObjectData, Recipe
from ..train.recipe import Optim
from ._small_pyramid import small_pyramid

__all__ = ["coco_overfit"]

RUNS = {"coco_overfit": ("sima",)}


def coco_overfit(mechanism: str) -> Recipe:
    """A small pyramid under a RetinaNet learns images of 160 pixels by heart, and is evaluated on them.

        sansmax train coco_overfit --data.root coco --data.num-samples 16 --data.val-samples 16

    What a network cannot learn by heart it cannot learn: a check of data and settings.

    Cost: 496 s of one CPU core with these 16 images.
    To reach: mAP 91.6 on them, measured on 16 of COCO's training photos; 76.1 on 64 of them after 55 of 60
    epochs.
    """
    return Recipe(
        model="soft_tiny",
        mechanism=mechanism,
        model_args=small_pyramid(mechanism),
        detector="retinanet",
        anchor_sizes=(12, 24, 48, 96, 160),
        fpn_channels=64,
        freeze_norm=True,
        short_sides=(160,),
        long_side=256,
        hflip=0.0,
        epochs=120,
        batch_size=4,
        data=ObjectData(root="coco", val_split="train"),
        optim=Optim(
            opt="adamw",
            lr=1e-3,
            lr_batch=None,
            weight_decay=0.0,
            clip=1.0,
            per="update",
            warmup=2,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

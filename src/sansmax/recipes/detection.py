"""Any mechanism finds handwritten digits on photographs."""

from .. import _find
from ..tasks._recipes.detection import Recipe
from ..train.recipe import Optim
from ._small_pyramid import small_pyramid

__all__ = ["detection"]

RUNS = {f"detection_{name}": (name,) for name in _find.names("sansmax.layers")}


def detection(mechanism: str) -> Recipe:
    """A pyramid of four small stages under a RetinaNet finds scikit-learn's digits on its photographs.

        sansmax train detection_sima --out digits
        sansmax predict digits photos --out digits.json --pictures found

    Nothing is fetched. `--data.root` names a folder in COCO's layout or a VOCdevkit; larger images want
    larger `--short-sides` and `--anchor-sizes`.

    Cost: 176 s of one CPU core (sima, with evaluation and report).
    To reach: mAP 45.9, mAP50 68.3, measured with sima; boxes at fixed places reach an mAP50 of 5.7.
    """
    return Recipe(
        model="soft_tiny",
        mechanism=mechanism,
        model_args=small_pyramid(mechanism),
        detector="retinanet",
        anchor_sizes=(20, 40, 64, 128, 256),
        fpn_channels=48,
        head_channels=256,
        short_sides=(64,),
        long_side=64,
        hflip=0.0,
        epochs=6,
        batch_size=16,
        optim=Optim(
            opt="adamw",
            lr=3e-3,
            lr_batch=None,
            weight_decay=0.05,
            clip=1.0,
            per="update",
            warmup=1,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

"""Any mechanism finds handwritten digits on photographs, pixel by pixel."""

from .. import _find
from ..tasks._recipes.segmentation import Recipe
from ..train.recipe import Optim
from ._small_pyramid import small_pyramid

__all__ = ["segmentation"]

RUNS = {f"segmentation_{name}": (name,) for name in _find.names("sansmax.layers")}


def segmentation(mechanism: str) -> Recipe:
    """A pyramid of four small stages under an FPN finds scikit-learn's digits on its photographs.

        sansmax train segmentation_sima --out digits
        sansmax predict digits photos --out masks

    Nothing is fetched. `--data.root` names a folder of images and masks, a VOCdevkit or an
    ADEChallengeData2016.

    Cost: 167 s of one CPU core (sima, with evaluation and report).
    To reach: mIoU 67.7, measured with sima; logistic regression on the colour of a pixel reaches 8.1.
    """
    return Recipe(
        model="soft_tiny",
        mechanism=mechanism,
        model_args=small_pyramid(mechanism),
        decoder="fpn",
        decoder_args={"pyramid_channels": 64, "segmentation_channels": 64, "dropout": 0.0},
        crop_size=(64, 64),
        rescale=(0.8, 1.2),
        hflip=0.0,
        epochs=12,
        batch_size=16,
        optim=Optim(
            opt="adamw",
            lr=2e-3,
            lr_batch=None,
            weight_decay=0.05,
            clip=1.0,
            per="update",
            warmup=1,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

"""Any mechanism on CamVid's street scenes, small enough for a CPU."""

from .. import _find
from ..tasks._recipes.segmentation import MaskData, Recipe
from ..train.recipe import Optim
from ._small_pyramid import small_pyramid

__all__ = ["camvid"]

RUNS = {f"camvid_{name}": (name,) for name in _find.names("sansmax.layers")}
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)


def camvid(mechanism: str) -> Recipe:
    """A pyramid of four small stages under an FPN, on images of half CamVid's size.

        sansmax train camvid_sima --data.root camvid

    The folder holds train, trainannot, val and valannot (images and masks of the SegNet tutorial: 11 classes,
    and 11 for what is none of them). Any other folder of images and masks: `--data.classes` names its values,
    `--data.ignore` says which one counts nowhere.

    Cost: not measured; written for a few minutes of one CPU core.
    To reach: not measured; docs/segmentation.md has every mechanism in this network after two epochs of
    smaller images.
    """
    return Recipe(
        model="soft_tiny",
        mechanism=mechanism,
        model_args=small_pyramid(mechanism),
        decoder="fpn",
        decoder_args={"pyramid_channels": 64, "segmentation_channels": 64, "dropout": 0.0},
        crop_size=(128, 160),
        rescale=(0.3, 0.8),
        scales=(0.5,),
        epochs=8,
        batch_size=8,
        data=MaskData(root="camvid", ignore=11, classes=CLASSES),
        optim=Optim(
            opt="adamw",
            lr=1e-3,
            lr_batch=None,
            weight_decay=0.05,
            clip=1.0,
            per="update",
            warmup=1,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

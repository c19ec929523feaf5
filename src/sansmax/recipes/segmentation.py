"""Any mechanism learns to find handwritten digits on photographs, pixel by pixel."""

from .. import _find
from ..tasks._recipes.segmentation import Recipe
from ..train.recipe import Optim

__all__ = ["segmentation"]

RUNS = {f"segmentation_{name}": (name,) for name in _find.names("sansmax.layers")}
OPTIONS = {
    "aft_full": {"factor_dim": 16},
    "aft_local": {"factor_dim": 16, "window": 8},
    "aft_conv": {"kernel_size": 5},
    "soft": {"landmarks": 16},
    "soft_norm": {"landmarks": 16},
}


def segmentation(mechanism: str) -> Recipe:
    """A pyramid of four small stages under an FPN."""
    options = {"mechanism_args": OPTIONS[mechanism]} if mechanism in OPTIONS else {}
    return Recipe(
        model="soft_tiny",
        mechanism=mechanism,
        model_args={
            "embed_dims": [32, 64, 128, 128],
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 4, 4],
            "softmax_free": True,
            **options,
        },
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

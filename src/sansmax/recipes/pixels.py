"""Any causal mechanism on scikit-learn's digits, sub-pixel by sub-pixel."""

from ..tasks._recipes.pixels import Recipe
from ..train.recipe import Data, Optim
from .chars import CAUSAL

__all__ = ["pixels"]

RUNS = {f"pixels_{name}": (name,) for name in CAUSAL}

OPTIONS = {
    "aft_local": {"window": 24, "factor_dim": 32},
    "aft_full": {"factor_dim": 32},
    "aft_conv": {"kernel_size": 24},
    "sima": {"token_scale": 32},
}


def pixels(mechanism: str) -> Recipe:
    """A small causal network (4 layers of 64) that learns 1,352 handwritten digits of 8 x 8 grey values.

        sansmax train pixels_aft_local --out pixels
        sansmax generate pixels --out digits.png

    Cost: with aft_local two minutes on two cores of an AMD EPYC.
    To reach: with aft_local 1.86 bits per dimension on the 445 held-out digits, where every sub-pixel by
    itself needs 2.42; one seed. No paper has these runs.
    """
    options = {"mechanism_args": OPTIONS[mechanism]} if mechanism in OPTIONS else {}
    return Recipe(
        mechanism=mechanism,
        model_args={"depth": 4, "embed_dim": 64, "num_heads": 4, **options},
        hflip=0.0,
        level=0,
        dropout=0.1,
        epochs=20,
        batch_size=32,
        data=Data(root="digits"),
        optim=Optim(
            opt="adamw",
            lr=3e-3,
            lr_batch=None,
            weight_decay=0.1,
            clip=1.0,
            sched="cosine",
            per="update",
            warmup=2,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

"""Any mechanism on scikit-learn's digits."""

from .. import _find
from ..train.recipe import Augment, Data, Optim, Recipe

__all__ = ["digits"]

RUNS = {f"digits_{name}": (name,) for name in _find.names("sansmax.layers")}


def digits(mechanism: str) -> Recipe:
    """A small ViT with any mechanism on 1,352 handwritten digits of 8 px, as `sansmax compare` trains it.

        sansmax train digits_sima

    Cost: 13 (aft_simple) to 41 seconds (soft_norm) in `sansmax compare`, on two cores of an AMD EPYC.
    To reach: top-1 on the 445 held-out digits in `sansmax compare`, one seed: softmax 98.0, aft_full,
    aft_local and sima 99.6, aft_simple, soft, soft_norm and xnorm 99.1, aft_conv and external 98.9,
    external_multihead 98.4.
    Differences below 1.9 points can be chance. No paper has these runs.

    The rate changes at every update: up over a tenth of them, then down to 0.
    """
    return Recipe(
        model="vit_mini",
        mechanism=mechanism,
        model_args={"patch_size": 2, "class_token": False},
        img_size=8,
        eval_crop=1.0,
        epochs=14,
        batch_size=48,
        data=Data(root="digits"),
        augment=Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), shift=1 / 16, hflip=0.0, smoothing=0.1),
        optim=Optim(
            opt="adamw",
            lr=2e-3,
            lr_batch=None,
            weight_decay=0.05,
            clip=1.0,
            sched="cosine",
            per="update",
            warmup=1.4,
            warmup_lr=2e-5,
            min_lr=0.0,
        ),
    )

"""Any causal mechanism on the sources of Python's standard library."""

from .. import _find
from ..tasks._recipes.chars import Recipe, TextData
from ..train.recipe import Optim

__all__ = ["chars"]

CAUSAL = ("aft_conv", "aft_full", "aft_local", "aft_simple", "sima", "softmax", "xnorm")
RUNS = {f"chars_{name}": (name,) for name in CAUSAL if name in _find.names("sansmax.layers")}

OPTIONS = {
    "aft_local": {"window": 32, "factor_dim": 64},
    "aft_full": {"factor_dim": 64},
    "aft_conv": {"kernel_size": 32},
    "sima": {"token_scale": 64},
}


def chars(mechanism: str) -> Recipe:
    """A small causal network (3 layers of 128, 128 bytes of context) that learns 2 MB of Python's sources.

        sansmax train chars_aft_local --out chars
        sansmax generate chars --prompt "def " --length 400

    `--data.root` names another file or a folder with train.*, valid.* and test.*.

    Cost: with aft_local three minutes on two cores of an AMD EPYC.
    To reach: with aft_local 2.2 bits per character on 50,000 held-out bytes, where counted pairs of bytes
    need 3.4; one seed. No paper has these runs.
    """
    options = {"mechanism_args": OPTIONS[mechanism]} if mechanism in OPTIONS else {}
    return Recipe(
        mechanism=mechanism,
        model_args={"depth": 3, "embed_dim": 128, "num_heads": 4, **options},
        tokens=128,
        dropout=0.0,
        epochs=6,
        batch_size=16,
        data=TextData(root="stdlib", val_bytes=50_000, sequences=2600),
        optim=Optim(
            opt="adamw",
            lr=3e-3,
            lr_batch=None,
            weight_decay=0.1,
            clip=1.0,
            sched="cosine",
            per="update",
            warmup=0.5,
            warmup_lr=1e-5,
            min_lr=1e-5,
        ),
    )

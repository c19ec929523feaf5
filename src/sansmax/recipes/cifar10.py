"""Any mechanism on CIFAR-10."""

from .. import _find
from ..train.recipe import Augment, Data, Optim, Recipe

__all__ = ["cifar10"]

RUNS = {f"cifar10_{name}": (name,) for name in _find.names("sansmax.layers")}

OPTIONS = {
    # A landmark for four tokens, as in the last stage of SOFT that has them; the layer makes 49 of any grid.
    # The convolution of V is 5 wide, as in SOFT's second stage.
    "soft": {"landmarks": 16, "conv_size": 5},
    "soft_norm": {"landmarks": 16, "conv_size": 5},
    # Changes nothing at the 64 tokens of training; at 64 px the same weights gain 8 points (see benchmarks).
    "sima": {"token_scale": 64},
}

# 10 epochs of 10,000 images: 58.1 % with this rate and a convolution 5 wide, 55.2 % with 1e-3 and 3 wide;
# softmax 57.5 % with 1e-3. Another number of landmarks (49), another start of their norm's weights (0.7) and
# averages in place of learned landmarks gained nothing.
RATES = {"soft": 3e-3, "soft_norm": 3e-3}


def cifar10(mechanism: str) -> Recipe:
    """A small ViT (192 channels, 6 blocks, patches of 4 by a convolutional stem) with any mechanism at 32 px.

        sansmax train cifar10_sima --data.download

    All images stay in memory and are augmented there. Without `--data.download` the set must lie in the
    folder cifar10, or the one that `--data.root` names, as torchvision stores it.

    Cost: one GPU; not measured.
    To reach: not measured. No paper has these runs.
    """
    return Recipe(
        model="vit_mini",
        mechanism=mechanism,
        model_args={
            "patch_size": 4,
            "embed_dim": 192,
            "depth": 6,
            "num_heads": 6,
            "class_token": False,
            "stem": "conv",
            **({"mechanism_args": OPTIONS[mechanism]} if mechanism in OPTIONS else {}),
        },
        img_size=32,
        eval_crop=1.0,
        drop_path=0.1,
        epochs=100,
        batch_size=512,
        precision="bf16",
        data=Data(root="cifar10", reader="torch/cifar10", memory=True),
        augment=Augment(
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            shift=0.125,
            hflip=0.5,
            reprob=0.25,
            mixup=0.2,
            cutmix=1.0,
            mix_prob=0.5,
            smoothing=0.1,
        ),
        optim=Optim(
            opt="adamw",
            lr=RATES.get(mechanism, 1e-3),
            lr_batch=512,
            weight_decay=0.05,
            clip=1.0,
            sched="cosine",
            per="update",
            warmup=5,
            warmup_lr=1e-6,
            min_lr=1e-5,
        ),
    )

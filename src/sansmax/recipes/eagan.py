"""External Attention in SAGAN (Guo et al., 2021, on image generation), and SAGAN itself."""

from typing import Any

from ..tasks._recipes.generation import Recipe
from ..train.recipe import Data, Optim

__all__ = ["eagan"]

RUNS = {
    f"{name}_{data}": (mechanism, data)
    for data in ("cifar10", "tiny_imagenet")
    for name, mechanism in (("eagan", "external"), ("sagan", "softmax"))
}

SIZES: dict[str, dict[str, Any]] = {
    "cifar10": {
        "widths": [256, 256, 256, 256],
        "discriminator_widths": [128, 128, 128, 128],
        "halvings": 2,
        "attention_after": 2,
    },
    "tiny_imagenet": {
        "widths": [1024, 512, 256, 128, 64],
        "discriminator_widths": [64, 128, 256, 512, 1024],
        "halvings": 4,
        "attention_after": 3,
    },
}


def eagan(mechanism: str, data: str) -> Recipe:
    """SAGAN as PyTorch-StudioGAN trains it, with External Attention or softmax in its place.

        sansmax train eagan_cifar10 --data.download --inception hub
        sansmax train eagan_tiny_imagenet --data.root tiny-imagenet-200 --inception hub

    CIFAR-10: batches of 64, five updates of the discriminator for one of the generator, Adam with 2e-4 and
    betas 0.5, 0.999. Tiny ImageNet (a folder a class in train and val): batches of 256, one for one, 1e-4 for
    the generator and 4e-4 for the discriminator, betas 0, 0.999. 100,000 updates of the generator, constant
    rates, no average of the weights, mirror images.

    Cost: not measured; a GPU.
    To reach: StudioGAN's SAGAN has FID 14.0 and IS 8.7 on CIFAR-10, FID 51.4 and IS 8.3 on Tiny ImageNet.
    With External Attention: the paper's figures, whose code was never released.

    Inferred: where External Attention stands (where SAGAN has attention), its sum (gamma times, from 0), a
    spectral norm on its query and output layers and none on its memories. SAGAN's own softmax layer has
    queries and keys of C/8 channels, values of C/2 and pools keys and values 2 x 2; ours has C and pools
    nothing. An update of the generator takes the turn of a batch of images, which is not looked at: 769 and
    513 epochs.
    """
    small = data == "cifar10"
    lr = 2e-4 if small else 1e-4
    return Recipe(
        mechanism=mechanism,
        model_args=dict(SIZES[data]),
        img_size=32 if small else 64,
        latent_dim=128,
        d_steps=5 if small else 1,
        d_lr_scale=1.0 if small else 4.0,
        hflip=0.5,
        epochs=769 if small else 513,
        batch_size=64 if small else 256,
        data=Data(root="cifar10", reader="torch/cifar10") if small else Data(root="tiny-imagenet-200"),
        optim=Optim(
            opt="adam",
            lr=lr,
            lr_batch=None,
            weight_decay=0.0,
            betas=(0.5, 0.999) if small else (0.0, 0.999),
            per="update",
            warmup=0,
            min_lr=lr,
        ),
    )

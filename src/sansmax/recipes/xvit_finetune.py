"""X-ViT and ViBid, fine-tuned at higher resolutions."""

from dataclasses import replace

from ..train.recipe import Recipe
from . import xvit

__all__ = ["xvit_finetune"]

BATCH_SIZES = {384: 1024, 512: 512, 768: 256}
RUNS = {f"{network}_{size}": (network, size) for network in xvit.RUNS for size in BATCH_SIZES}


def xvit_finetune(network: str, img_size: int) -> Recipe:
    """X-ViT and ViBid, trained at 224 px, fine-tuned on ImageNet-1k at 384, 512 or 768 px.

        sansmax train vibid_medium_p16_384 --weights vibid_medium_p16-run --data.root imagenet

    `--weights` must be given: the folder of a run of the same network at 224 px, or its weights. Positions
    are resampled.

    Cost: not stated.
    To reach: ViBid's top-1 medium 384 px 83.8; base 84.5, 84.7 and 84.8 at 384, 512 and 768 px. The others:
    not published.

    Source: ViBid, section 4 and supplement: 10 epochs, SGD (AdamW trains at 224 px), rate 0.01, cosine, no
    warm-up, no weight decay, clipping at 0.5, drop path and RandAugment as in training.
    Differences: batch 1024, 512 and 256 at 384, 512 and 768 px, as the main text says; the supplement says
    4096. The rate is 0.01 at any batch.
    Assumed: momentum 0.9 in Nesterov's form, timm's sgd; lowest rate 0; all else as in training at 224 px.
    """
    base = xvit.xvit(network)
    return replace(
        base,
        img_size=img_size,
        epochs=10,
        batch_size=BATCH_SIZES[img_size],
        optim=replace(
            base.optim,
            opt="sgd",
            lr=0.01,
            lr_batch=None,
            weight_decay=0.0,
            momentum=0.9,
            clip=0.5,
            warmup=0,
            min_lr=0.0,
        ),
    )

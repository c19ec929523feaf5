"""X-ViT and ViBid."""

from dataclasses import replace

from ..train.recipe import Recipe
from ._imagenet import DEIT

__all__ = ["xvit"]

# Rate for 512 images, drop path, RandAugment's strength (ViBid, supplement, table 1).
SIZES = {
    "u": (5e-5, 0.0, 7),
    "tiny": (5e-5, 0.05, 7),
    "small": (5e-5, 0.1, 7),
    "medium": (4e-5, 0.15, 9),
    "base": (4e-5, 0.25, 12),
}
RUNS = {f"{family}_{size}_p16": (f"{family}_{size}_p16",) for family in ("xvit", "vibid") for size in SIZES}


def xvit(network: str) -> Recipe:
    """X-ViT (xvit_*) and ViBid (vibid_*) on ImageNet-1k at 224 px.

        sansmax train vibid_small_p16 --data.root imagenet

    Cost: 32 A100; hours: not stated.
    To reach: ViBid's top-1 u 76.3, tiny 78.8, small 82.0, medium 82.8, base 83.3. X-ViT's own: not found.

    Source: ViBid, section 4.1 and supplement, table 1: AdamW, batch 4096, 400 epochs, 5 warm-up epochs from
    1e-6, cosine, weight decay 0.05, clipping at 0.5, label smoothing 0.1, CutMix, RandAugment (2 operations
    of strength 7, 9 or 12), no distillation. No code was published.
    Differences: none known. The rate is the printed 5e-5 (u, tiny, small) or 4e-5 (medium, base) for 512
    images, 4e-4 or 3.2e-4 at 4096; XCiT's is ten times as high for 512 images.
    Assumed:
    - X-ViT's recipe is ViBid's.
    - lowest rate 1e-5; mixup 0.8, CutMix 1.0 and their probabilities, random erasing 0.25, repeated
      augmentation, mstd0.5 and inc1 of RandAugment, bicubic and fp16: DeiT's and XCiT's.
    - no moving average; evaluation of the full crop, as XCiT's.
    """
    lr, drop_path, strength = SIZES[network.split("_")[1]]
    return replace(
        DEIT,
        model=network,
        eval_crop=1.0,
        drop_path=drop_path,
        epochs=400,
        batch_size=4096,
        augment=replace(DEIT.augment, auto_augment=f"rand-m{strength}-n2-mstd0.5-inc1"),
        optim=replace(DEIT.optim, lr=lr, clip=0.5, ema=0.0, evaluate_ema=True),
    )

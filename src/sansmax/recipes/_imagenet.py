"""What the recipes for ImageNet-1k share: DeiT's, from which most of the papers start.

Published code facebookresearch/deit, main.py. `color_jitter` is said there and unused beside RandAugment.
"""

from dataclasses import replace

from ..train.recipe import Augment, Data, Optim, Recipe

__all__ = ["AUGMENT", "DEIT"]

AUGMENT = Augment(
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    hflip=0.5,
    interpolation="bicubic",
    color_jitter=0.4,
    auto_augment="rand-m9-mstd0.5-inc1",
    reprob=0.25,
    mixup=0.8,
    cutmix=1.0,
    mix_prob=1.0,
    mix_switch=0.5,
    smoothing=0.1,
    repeats=1,
)

DEIT = Recipe(
    img_size=224,
    eval_crop=0.875,
    drop_path=0.1,
    epochs=300,
    batch_size=1024,
    precision="fp16",
    data=Data(root="imagenet"),
    augment=replace(AUGMENT, repeats=3),
    optim=Optim(
        opt="adamw",
        lr=5e-4,
        lr_batch=512,
        weight_decay=0.05,
        clip=None,
        sched="cosine",
        per="epoch",
        warmup=5,
        warmup_lr=1e-6,
        min_lr=1e-5,
        ema=0.99996,
        evaluate_ema=False,
    ),
)

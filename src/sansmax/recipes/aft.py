"""AFT in DeiT."""

from dataclasses import replace

from ..train.recipe import Recipe
from ._imagenet import DEIT

__all__ = ["aft"]

BASE = "aft_conv_base_p16_k25_h32"
NETWORKS = (
    "aft_full_tiny_p16",
    "aft_full_small_p16",
    "aft_conv_tiny_p16_k11_h32",
    "aft_conv_tiny_p16_k11_h192",
    "aft_conv_small_p16_k11_h16",
    "aft_conv_small_p16_k11_h384",
    "aft_conv_small_p16_k15_h384",
    BASE,
)
RUNS = {network: (network,) for network in NETWORKS}


def aft(network: str) -> Recipe:
    """AFT-full and AFT-conv in DeiT on ImageNet-1k, with DeiT's recipe.

        sansmax train aft_conv_small_p16_k15_h384 --data.root imagenet

    Cost: 8 V100; hours: not stated.
    To reach: top-1 aft_full tiny 72.4, small 79.8; aft_conv tiny k11 h32 73.9, h192 74.8; small k11 h16 80.2,
    h384 80.8, k15 h384 81.0 (Table 7). The last network reaches 81.6 at 384 px without training there:

        sansmax eval sansmax-run --img-size 224 384

    aft_conv_base: 81.6 at 384 px from random weights (Table 8). Its 83.4 begins with DeiT-base-384's weights
    without positions, class token, keys and queries, which `--weights` refuses as incomplete.

    Source: AFT, section 5.3: "DeiT recipe", batch, augmentation, regularisation and schedule unchanged; plain
    PyTorch in full precision. No code was published.
    Differences: DeiT's code runs epochs 0 and 1 at 1e-6, here epoch 0 alone. Its cool-down epochs are never
    run and its moving average (0.99996) is never evaluated, there or here.
    Assumed:
    - drop path 0.1 and a crop of 0.875 in evaluation: DeiT's.
    - aft_conv_base from random weights has the fine-tuning's 100 epochs and 64 images an update; whether
      those are 64 a GPU is not said. The rate follows the batch, as in DeiT.
    """
    recipe = replace(DEIT, model=network, precision="fp32")
    return replace(recipe, img_size=384, epochs=100, batch_size=64) if network == BASE else recipe

"""SimA in XCiT's detector on COCO (Koohpayegani and Pirsiavash, 2024; El-Nouby et al., 2021)."""

from ..tasks._recipes.detection import Recipe
from ._coco import coco

__all__ = ["coco_sima"]

RUNS = {"coco_sima_xcit_small_12_p16_mask_rcnn": ("sima_small_12_p16_pyramid",)}


def coco_sima(network: str) -> Recipe:
    """Mask R-CNN on SimA's XCiT-S12/16, 36 epochs ("3x") of COCO with short sides of 480 to 800 pixels.

        sansmax train coco_sima_xcit_small_12_p16_mask_rcnn --data.root coco --weights sima_small_12_p16.pth

    `--weights` is a classifier of ImageNet, here in the authors' layout; the maps are those of blocks 3, 5, 7
    and 11.

    Cost: not stated for SimA, and not measured here; XCiT trains it in half precision, 16 images an update.
    To reach: SimA's figures are in no source that was found. XCiT-S12/16, the same network with
    cross-covariance attention: 45.3 box AP, 40.8 mask AP on val2017.

    Source: XCiT, detection (mmdetection 2.11): AdamW 1e-4, decay 0.05, none of norms, drop path 0.05. SimA's
    code for COCO was never published.
    Differences:
    - bfloat16 in place of half precision.
    - Which short sides XCiT draws was not found; 480 to 800 are the usual ones of 3x.
    - Batch norms are frozen; whether XCiT's learned is not stated in what was found.
    """
    return coco(
        36,
        "adamw",
        1e-4,
        0.05,
        short_sides=tuple(range(480, 801, 32)),
        model=network,
        detector="mask_rcnn",
        drop_path=0.05,
        precision="bf16",
    )

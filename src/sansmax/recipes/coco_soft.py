"""SOFT++ on COCO (Lu et al., 2022; published code fudan-zvg/SOFT)."""

from ..tasks._recipes.detection import Recipe
from ._coco import coco

__all__ = ["coco_soft"]

RUNS = {
    f"coco_soft_norm_{size}_{detector}": (size, detector)
    for size in ("tiny", "small", "medium", "large")
    for detector in ("retinanet", "mask_rcnn")
}


def coco_soft(size: str, detector: str) -> Recipe:
    """RetinaNet and Mask R-CNN on the normalised SOFT, 12 epochs ("1x") of COCO.

        sansmax train coco_soft_norm_tiny_retinanet --data.root coco --weights soft_norm_tiny.safetensors
        sansmax train coco_soft_norm_tiny_mask_rcnn --data.root coco --weights soft_norm_tiny.safetensors

    `--weights` is a classifier of ImageNet, from `sansmax convert` or a run.

    Cost: not stated, and not measured here; batch 16 is 8 GPUs with 2 images each in mmdetection.
    To reach: the box AP that the authors' README gives for val2017, RetinaNet tiny 40.0 (23 M parameters),
    small 42.8 (34 M), medium 44.3 (55 M), large 45.3 (74 M); Mask R-CNN box / mask tiny 41.2 / 38.2 (33 M),
    small 43.8 / 40.1 (44 M), medium 46.6 / 42.0 (65 M), large 47.0 / 42.2 (84 M).

    Differences: the authors' code and settings for COCO are not published. AdamW with 1e-4, decay 0.05 and
    frozen batch norms are an inference from PVT, whose detection code is the usual one for such pyramids. The
    linear form, `--model-args '{"landmarks": 49, "softmax_free": true}'`, is another network than theirs.
    """
    return coco(12, "adamw", 1e-4, 0.05, short_sides=(800,), model=f"soft_norm_{size}", detector=detector)

"""External Attention on COCO (Guo et al., 2021)."""

from ..tasks._recipes.detection import Recipe
from ._coco import coco

__all__ = ["coco_external"]

RUNS = {f"coco_external_resnet50_{detector}": (detector,) for detector in ("mask_rcnn", "retinanet")}


def coco_external(detector: str) -> Recipe:
    """A detector on ResNet-50 with External Attention on its last map, 12 epochs ("1x") of COCO.

        sansmax train coco_external_resnet50_mask_rcnn --data.root coco --weights pretrained

    `pretrained` fetches timm's ImageNet weights of the ResNet.

    Cost: not stated, and not measured here.
    To reach: the paper's figures are in no source that was found. Without the attention mmdetection has Mask
    R-CNN 38.2 box / 34.7 mask AP, and RetinaNet 36.5 box AP.

    An inference: code, settings and logs of this were never published. Where the attention stands is an
    author's answer to a question: "added at the very end of the ResNet, i.e. the last layer of the backbone".
    Assumed are its width, all 2,048 channels, its norm and sum, those of EANet, and mmdetection's settings
    of the baseline.
    Difference from the baseline: all layers learn; mmdetection keeps the stem and the first stage.
    """
    lr = 0.02 if detector == "mask_rcnn" else 0.01
    return coco(
        12,
        "momentum",
        lr,
        1e-4,
        short_sides=(800,),
        model="resnet50",
        mechanism="external",
        detector=detector,
    )

"""timm's augmentations under Pillow 13, which refuses to posterize to no bits at all."""

from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp

__all__ = ["mended"]


def mended(transform: Any) -> Any:
    """The transform, whose operations named Posterize* make a black image of 0 bits, as under Pillow 12.

    rand-m9-mstd0.5-inc1, the policy of DeiT and of most papers here, drew 0 bits for 2 of 600 images.
    """
    for part in transform.transforms:
        groups = [getattr(part, "ops", []), *getattr(part, "policy", [])]
        for operation in (op for group in groups for op in group):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)

"""Which held-out images a report shows, and what was said of them."""

import io
from typing import Any

from PIL import Image
from torch import Tensor

from ..tasks._data import Images

__all__ = ["gallery"]

PICTURES, MISTAKES = 24, 18


def gallery(images: Images, results: dict[str, Any]) -> list[dict[str, Any]]:
    """First the images on which most mechanisms of the first seed fail, then some on which all are right."""
    said = {name: m["runs"][0]["predictions"] for name, m in results["mechanisms"].items()}
    truth = images.val_labels.tolist()
    wrong = [sum(predicted[i] != label for predicted in said.values()) for i, label in enumerate(truth)]
    mistaken = sorted((i for i, count in enumerate(wrong) if count), key=lambda i: (-wrong[i], i))
    right = [i for i, count in enumerate(wrong) if not count]
    shown = mistaken[: max(MISTAKES, PICTURES - len(right))]
    rest = PICTURES - len(shown)
    shown += right[:: max(1, len(right) // max(1, rest))][:rest]
    return [
        {
            "png": _png(images.val_images[i]),
            "truth": images.classes[truth[i]],
            "predictions": {name: images.classes[predicted[i]] for name, predicted in said.items()},
        }
        for i in shown
    ]


def _png(image: Tensor) -> bytes:
    """uint8 (1 or 3, height, width) as a file."""
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()

"""What is exported of a run of another task than classification."""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models import Decoder
from ..models._eanet import EANet
from ..tasks._data.points import shape_of
from ..tasks._task import Trained
from ._subject import Size, Subject, images, point_clouds, stream

__all__ = ["of_run"]


def of_run(trained: Trained, size: Size | None = None) -> tuple[Subject, dict[str, Any]]:
    """The network of the run, traced at `size` where it takes images, and what the card and the graphs'
    metadata tell of it.

    Raises:
        ValueError: networks of this task are not exported.
    """
    recipe, model = trained.recipe, trained.model
    mechanism = f" with {recipe.mechanism}" if recipe.mechanism else ""
    about: dict[str, Any] = {"name": recipe.model + mechanism, "task": recipe.task}
    if isinstance(model, Decoder):
        return stream(model), about | {"name": f"decoder{mechanism}"}
    about["classes"] = trained.classes
    if recipe.task == "segmentation":
        seen = {
            "channels": "red, green, blue, from 0 to 1, then (value - mean) / std",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        }
        if isinstance(model, EANet):
            stride = model.feature_info[-1]["reduction"]
            seen["sides"] = (
                f"1 more than a multiple of {stride}: 0 at the right and below after the normalisation"
            )
        return images(model, 3, size or recipe.crop_size), about | {"preprocessing": seen}  # pyright: ignore
    if recipe.task == "points":
        categories = len(set(map(shape_of, trained.classes)))
        labels = categories if recipe.kind == "parts" else 0
        seen = {"points": "x, y, z; centred on their mean and scaled into the unit ball"}
        return point_clouds(model, 3, recipe.points, labels), about | {"preprocessing": seen}
    raise ValueError(
        f"network: expected a run of classification, segmentation, points, chars or pixels, got one of "
        f"{recipe.task}; sansmax exports no others"
    )

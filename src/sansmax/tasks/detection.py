"""Where objects are, what they are and, with masks, which pixels are theirs."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..models._detector import Detector, Images
from ..models._published import begin_with
from ._data._decode import reason, to_rgb
from ._data.draws import Part
from ._data.folder import image_files
from ._data.object_views import Seen, Views, fitting, resized
from ._data.objects import name_of, open_objects
from ._data.sources import workers
from ._detections import FIGURES, Found, agreement, ap_of, coco_results, found_in, from_rows, to_rows
from ._mask_pictures import class_bars
from ._object_files import Journal
from ._object_pictures import drawn, truth_and_found
from ._recipes.detection import Recipe
from ._run import at_least, shares
from ._task import Picture, Task, Trained

__all__ = ["Detection", "Recipe", "build", "load_weights", "open_task", "predict"]

SHOWN = 6  # images of the report
SURE = 0.3  # the least score that is shown


class Detection(Task):
    """The sum of a detector's losses; COCO's mean average precision of boxes and, with mask_rcnn, of masks.

    RetinaNet: focal loss (alpha 0.25, gamma 2) and L1. Faster and Mask R-CNN: cross-entropies and smooth L1
    of proposals and of boxes, and the cross-entropy of a mask's cells. All as torchvision has them.
    """

    def __init__(self, views: Views, recipe: Recipe) -> None:
        train, val = views.train_objects, views.val_objects
        self.views, self.recipe, self.skipped = views, recipe, views.skipped
        self.title, self.split, self.classes = train.title, val.title, train.classes
        self.train_size, self.val_size = len(train), len(val)
        self.kinds = {"": "bbox"} | ({"mask_": "segm"} if recipe.detector == "mask_rcnn" else {})
        self.figures = {
            f"{prefix}{name}": f"{prefix.replace('_', ' ')}{title}"
            for prefix in self.kinds
            for name, (_, title) in FIGURES.items()
        }

    @property
    def used(self) -> int:
        return self.val_size - (len(self.skipped) - self.views.rejected)

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Images, None]]:
        return self.views.train(epoch, update, part)

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Seen]:
        return self.views.val(rank, world, batch_size)

    def loss(self, outputs: dict[str, Tensor], targets: None) -> Tensor:
        return torch.stack([loss.float() for loss in outputs.values()]).sum()

    def outputs(self, network: nn.Module, batch: Any) -> list[Found]:
        """In the pixels of the images' files."""
        seen = [(image.shape[1], image.shape[2]) for image in batch.inputs.pixels]
        return list(map(found_in, network(batch.inputs), seen, batch.sizes))

    def verdict(self, outputs: list[Found], batch: Any) -> Tensor:
        return torch.cat(list(map(to_rows, batch.positions.tolist(), outputs)))

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        """Those of `figures` that have an object: without a large one there is no mAP of large ones."""
        found = {
            f"{prefix}{name}": value
            for prefix, kind in self.kinds.items()
            for name, value in self._ap(verdicts, kind)[0].items()
        }
        return {"map": 0.0, **found}

    def _ap(self, verdicts: Tensor, kind: str) -> tuple[dict[str, float], list[float | None]]:
        found, val = dict(from_rows(verdicts)), self.views.val_objects
        truths = ((i, val.truth(i), val.size(i)) for i in found)
        return ap_of(truths, found.items(), len(self.classes), kind)

    def details(self, verdicts: Tensor) -> dict[str, Any]:
        """mAP of every class, None where there is no object, and how many objects are of it."""
        told: dict[str, Any] = {
            f"{prefix}map": dict(zip(self.classes, self._ap(verdicts, kind)[1], strict=True))
            for prefix, kind in self.kinds.items()
        }
        val = self.views.val_objects
        labels = np.concatenate([val.truth(i).labels[~val.truth(i).crowd] for i, _ in from_rows(verdicts)])
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        return {**told, "objects": dict(zip(self.classes, counts, strict=True))}

    def example(self) -> Images:
        side = self.recipe.evaluation_side
        return Images([torch.zeros(3, side, side)])

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """mAP of every class, and images from the worst to the best."""
        val, names = self.views.val_objects, [name_of(label) for label in self.classes]
        bars = [
            Picture(
                f"{title} of every class",
                class_bars(names, [np.nan if v is None else v for v in self._ap(verdicts, kind)[1]], title),
                "COCO's, over all held-out images; no bar where no object is of the class.",
            )
            for title, kind in zip(("mAP, %", "mask mAP, %"), self.kinds.values(), strict=False)
        ]
        found = [(i, one.above(SURE)) for i, one in from_rows(verdicts)]
        scores = np.array([agreement(val.truth(i), one) for i, one in found])
        ranked = scores.argsort(kind="stable")
        chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).astype(int))]
        shown = [(val.read(found[at][0]), val.truth(found[at][0]), found[at][1]) for at in chosen]
        return [
            *bars,
            Picture(
                "Truth, and what was found",
                truth_and_found(shown, names),
                f"Held-out images from the worst to the best by the F1 of detections with a score of {SURE} "
                "at IoU 0.5: " + ", ".join(f"{scores[at]:.2f}" for at in chosen) + ".",
            ),
        ]


def open_task(recipe: Recipe, device: torch.device) -> Detection:
    """Looks for the images and reads what is in them."""
    train, val = open_objects(recipe.data, recipe.detector == "mask_rcnn")
    for name, objects in (("split", train), ("val_split", val)):
        if not any((~objects.truth(i).crowd).any() for i in range(len(objects))):
            raise ValueError(
                f"data.{name}: expected images with objects in {objects.title}, got none in {len(objects)} "
                "images; check the split and the number of samples"
            )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = 0 if recipe.data.root == "digits" else workers(recipe.data, processes)  # pyright: ignore
    return Detection(Views(train, val, recipe, count, device), recipe)


def build(recipe: Recipe, classes: list[str], pretrained: bool = False) -> Detector:
    """The network, with random weights.

    Raises:
        ValueError: no network has that name, or it does not take the further words.
    """
    words: dict[str, Any] = dict(recipe.model_args)
    if recipe.drop_path:
        words["drop_path_rate"] = recipe.drop_path
    side = recipe.evaluation_side
    try:
        return Detector(
            recipe.detector,
            recipe.model,
            recipe.mechanism,
            num_classes=len(classes),
            anchor_sizes=recipe.anchor_sizes,
            fpn_channels=recipe.fpn_channels,
            head_channels=recipe.head_channels,
            freeze_norm=recipe.freeze_norm,
            detector_args=recipe.detector_args,
            pretrained=pretrained,
            **{"img_size": (side, side), **words},
        )
    except TypeError as error:
        raise ValueError(
            f"model_args, detector_args: expected words that {recipe.model} and {recipe.detector} take, got "
            f"{' '.join(str(error).split())}; check them"
        ) from None


def load_weights(model: Detector, recipe: Recipe) -> None:
    """The recipe's `weights` into a new network: a run's folder, or a file of a whole detector or of its
    network alone (a classifier of sansmax or of the authors); pretrained: timm's weights of the network.
    Layers for another number of classes stay as they were built.

    Raises:
        ValueError, OSError: they are not there, or are another network's.
    """
    if recipe.weights == "pretrained":
        donor = build(replace(recipe, detector="faster_rcnn"), [""], pretrained=True)
        own = model.encoder.state_dict()
        model.encoder.load_state_dict({k: v for k, v in donor.encoder.state_dict().items() if k in own})
        return
    heads = ("cls_logits", "box_predictor", "mask_fcn_logits")
    begin_with(model, model.encoder, recipe.weights, heads)


def predict(
    trained: Trained,
    source: Path,
    /,
    out: Path = Path("detections.json"),
    score: float = 0.05,
    pictures: Path | None = None,
    eval_side: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
) -> None:
    """Writes the objects of every image of SOURCE to OUT, in COCO's format of results.

    Each entry has image_id (the number that is the file's name, or else its path), file_name, category_id,
    bbox (x, y, width and height in pixels) and score and, of mask_rcnn, segmentation, a run-length code.
    Images that cannot be read are listed in OUT's name with .skipped.json. The same command, given again
    after an interruption, goes on where it stood.

    Args:
        source: an image, or a folder with all below it.
        out: a .json file, written whole or not at all.
        score: the least that is written.
        pictures: a folder for the images with what was found in them (score 0.3).
        eval_side: short side of what the network sees (default: the run's).
        batch_size: images that the network takes at a time.
        device: auto, cpu or cuda.
    """
    if out.suffix != ".json":
        raise ValueError(f"out: expected a file that ends in .json, got {out}; rename it")
    at_least(1, batch_size=batch_size, eval_side=eval_side)
    shares({"score": score})
    own: Recipe = trained.recipe
    recipe = replace(own, eval_side=eval_side or own.eval_side).checked()
    top = source.parent if source.is_file() else source
    files = {path.relative_to(top).as_posix(): path for path in image_files(source)}
    numbers = [int(label.partition(" ")[0]) for label in trained.classes]
    names = [name_of(label) for label in trained.classes]
    how = (trained.classes, recipe.evaluation_side, recipe.long_side, score, str(pictures))
    with Journal(out, trained.mark(*how)) as journal:
        before = len(journal.done & files.keys())
        left = [name for name in files if name not in journal.done]
        trained = trained.on(device)
        for start in range(0, len(left), batch_size):
            images: dict[str, np.ndarray] = {}
            for name in left[start : start + batch_size]:
                try:
                    images[name] = _opened(files[name])
                except (
                    Exception
                ) as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
                    journal.add(name, None, reason(error, files[name]))
            found_in_all = objects_in(trained, list(images.values()), recipe)
            for (name, image), found in zip(images.items(), found_in_all, strict=True):
                number = int(files[name].stem) if files[name].stem.isdecimal() else name
                entries = coco_results(number, found.above(score), numbers)
                if pictures is not None:
                    to = pictures / f"{name}.png"
                    to.parent.mkdir(parents=True, exist_ok=True)
                    drawn(image, found.above(SURE), names).save(to)
                journal.add(name, [{**entry, "file_name": name} for entry in entries])
        count, skipped = journal.finish()
    if len(skipped) == len(files):
        raise ValueError(
            f"source: expected an image that can be read in {source}, got none ({skipped[0]['path']}: "
            f"{skipped[0]['reason']}); check the files"
        )
    told = f", {before:,} of them from before" if before else ""
    if skipped:
        told += f", {len(skipped):,} unreadable, listed in {out.with_suffix('.skipped.json')}"
    print(f"{out}: {count:,} objects in {len(files) - len(skipped):,} images{told}")


def objects_in(trained: Trained, images: list[np.ndarray], recipe: Recipe) -> list[Found]:
    """Of images uint8 (height, width, 3), in their pixels."""
    if not images:
        return []
    sizes = [fitting(image.shape[:2], recipe.evaluation_side, recipe.long_side) for image in images]
    seen = [resized(image, size).to(trained.device) for image, size in zip(images, sizes, strict=True)]
    with torch.inference_mode():
        outputs = trained.model(Images(seen))
    return [found_in(o, s, i.shape[:2]) for o, s, i in zip(outputs, sizes, images, strict=True)]


def _opened(path: Path) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(path) as opened:
        warnings.simplefilter("ignore")  # PIL warns of odd metadata in images that it reads well
        return np.array(to_rgb(opened))

"""Which class every pixel of an image belongs to."""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import models
from ..models._dense import Dense
from ..models._eanet import EANet
from ..models._published import begin_with
from ._data._decode import reason, to_rgb
from ._data.crops import Masked, Pixels
from ._data.draws import Part
from ._data.masks import IGNORED, open_scenes
from ._data.sources import workers
from ._mask_files import mark_of, names_of, write_mask
from ._mask_pictures import beside, class_bars
from ._recipes.segmentation import Recipe
from ._task import Picture, Task, Trained, rows
from ._windows import Look

__all__ = ["Recipe", "Segmentation", "build", "load_weights", "open_task", "predict"]

SHOWN = 6  # images of the report


class Segmentation(Task):
    """Cross-entropy of every pixel.

    loss = sum of -ln p(class) over the pixels that have a class, divided by their number ("labelled") or by
    that of all pixels ("pixels": published code of EANet, train_torch.py, whose mean over an image counts the
    ignored ones as 0). mIoU = mean over the classes c that are anywhere in truth or prediction of
    |truth = c and prediction = c| / |truth = c or prediction = c|, over all held-out pixels with a class;
    equal to torchmetrics' MulticlassJaccardIndex(ignore_index=255).
    """

    figures = MappingProxyType({"miou": "mIoU, %", "accuracy": "pixel accuracy, %", "loss": "loss"})

    def __init__(self, pixels: Pixels, recipe: Recipe) -> None:
        train, val = pixels.train_scenes, pixels.val_scenes
        self.pixels, self.recipe, self.skipped = pixels, recipe, pixels.skipped
        self.title, self.split, self.classes = train.title, val.title, train.classes
        self.train_size, self.val_size = len(train), len(val)

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        return self.pixels.train(epoch, update, part)

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Masked]:
        return self.pixels.val(rank, world, batch_size)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = F.cross_entropy(outputs.float(), targets, ignore_index=IGNORED, reduction="sum")
        counted = targets.numel() if self.recipe.loss == "pixels" else (targets != IGNORED).sum().clamp(min=1)
        return total / counted

    def outputs(self, network: nn.Module, batch: Any) -> Tensor:
        """(B, 1 + 3 classes) float64: of every image the sum of -ln p of the true class over the pixels that
        have one, and of every class its pixels in truth and prediction both, in the truth, in the prediction.
        """
        size, count = len(batch), len(self.classes)
        total = torch.zeros(size, 1 + 3 * count, dtype=torch.float64, device=batch.targets.device)
        # Of a batch, the images are counted at once: the numbers of an image's classes follow the last one's.
        first = count * torch.arange(size, device=total.device)[:, None, None]
        for top, logits in look(network, self.recipe).bands(network, batch.inputs):
            truth = batch.targets[:, top : top + logits.shape[2]].long()
            nats = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none")
            nats = nats.sum((1, 2), dtype=torch.float64)
            found, known = logits.argmax(1), truth != IGNORED
            kinds = (found, known & (found == truth)), (truth, known), (found, known)
            counts = [(first + x)[where].bincount(minlength=size * count) for x, where in kinds]
            total += torch.cat([nats[:, None], *(x.view(size, count) for x in counts)], 1)
        return total

    def verdict(self, outputs: Tensor, batch: Any) -> Tensor:
        return rows(batch.positions, outputs)

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        both, truth, _ = self._counts(verdicts.sum(0))
        labelled = truth.sum().clamp(min=1)
        share = self.by_class(verdicts)
        return {
            "miou": share[share.isfinite()].mean().nan_to_num().item(),
            "accuracy": (both.sum() / labelled).item(),
            "loss": (verdicts[:, 1].sum() / labelled).item(),
        }

    def by_class(self, verdicts: Tensor) -> Tensor:
        """Intersection over union of every class over all images (classes,), NaN where there is none."""
        both, truth, found = self._counts(verdicts.sum(0))
        return both / (truth + found - both)

    def _counts(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both, truth, found = row[2:].view(3, len(self.classes))
        return both, truth, found

    def details(self, verdicts: Tensor) -> dict[str, Any]:
        """IoU of every class, None where there is no pixel, and how many pixels are truly of it."""
        _, truth, _ = self._counts(verdicts.sum(0))
        shares = [None if s != s else s for s in self.by_class(verdicts).tolist()]
        return {"iou": dict(zip(self.classes, shares, strict=True))} | {
            "pixels": dict(zip(self.classes, map(int, truth.tolist()), strict=True))
        }

    def example(self) -> Tensor:
        return torch.zeros(1, 3, *self.recipe.crop_size)

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """IoU of every class, and images of which from few to nearly all pixels are right."""
        count = len(self.classes)
        share = verdicts[:, 2 : 2 + count].sum(1) / verdicts[:, 2 + count : 2 + 2 * count].sum(1).clamp(min=1)
        ranked = share.argsort(stable=True)
        chosen = ranked[torch.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).long().unique()]
        device, shown = next(network.parameters()).device, []
        for row in chosen.tolist():
            image, truth = self.pixels.val_scenes.read(int(verdicts[row, 0]))
            seen = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
            shown.append((image, truth, classes_of(network, seen, self.recipe), 100 * share[row].item()))
        return [
            Picture(
                "IoU of every class",
                class_bars(self.classes, self.by_class(verdicts).tolist()),
                "Over all held-out pixels; no bar where no pixel is of the class, in truth or prediction.",
            ),
            Picture(
                "Image, truth, prediction",
                beside(shown, self.classes),
                "Held-out images from the worst (top) to the best by the share of right pixels: "
                + ", ".join(f"{s:.1f} %" for *_, s in shown)
                + ". White: no class.",
            ),
        ]


def look(network: nn.Module, recipe: Recipe) -> Look:
    """How the recipe evaluates."""
    stride = network.feature_info[-1]["reduction"] if isinstance(network, EANet) else None
    return Look(recipe.scales, recipe.eval_flip, recipe.window, recipe.stride, stride)


def classes_of(network: nn.Module, image: Tensor, recipe: Recipe) -> np.ndarray:
    """uint8 (1, 3, height, width) -> the most probable class of every pixel, uint8 (height, width)."""
    parts = [y[0].argmax(0).byte().cpu() for _, y in look(network, recipe).bands(network, image)]
    return torch.cat(parts).numpy()


def open_task(recipe: Recipe, device: torch.device) -> Segmentation:
    """Looks for the images and masks."""
    train, val = open_scenes(recipe.data)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = 0 if recipe.data.root == "digits" else workers(recipe.data, processes)  # pyright: ignore
    pixels = Pixels(train, val, recipe.crop_size, recipe.rescale, recipe.hflip, count, device)
    return Segmentation(pixels, recipe)


def build(recipe: Recipe, classes: list[str], pretrained: bool = False) -> EANet | Dense:
    """The network, with random weights.

    Raises:
        ValueError: no network has that name, or it does not go with the decoder or the further words.
    """
    words: dict[str, Any] = {"num_classes": len(classes), "img_size": recipe.crop_size, **recipe.model_args}
    if recipe.drop_path:
        words["drop_path_rate"] = recipe.drop_path
    own = recipe.model.startswith("eanet_")
    if own == bool(recipe.decoder):
        raise ValueError(
            f"decoder: expected {'none' if own else 'fpn or upernet'} with {recipe.model}, which has "
            f"{'a' if own else 'no'} head for pixels, got {recipe.decoder or 'none'}; change it"
        )
    try:
        if own:
            net: Any = models.create_model(recipe.model, recipe.mechanism, **words)
            return net
        return Dense(
            recipe.model,
            recipe.mechanism,
            decoder=recipe.decoder,
            decoder_args=recipe.decoder_args,
            pretrained=pretrained,
            **words,
        )
    except TypeError as error:
        raise ValueError(
            f"model_args, decoder_args: expected words that {recipe.model} and its decoder take, got "
            f"{' '.join(str(error).split())}; check them"
        ) from None


def load_weights(model: EANet | Dense, recipe: Recipe) -> None:
    """The recipe's `weights` into a new network: a run's folder, or a file of a whole network or of its
    backbone alone (the authors' ImageNet files of EANet's ResNet, a classifier of sansmax). A last layer for
    another number of classes stays as it was built. pretrained: timm's weights of the backbone, which are
    resnet50s and resnet101s for EANet.

    Raises:
        ValueError, OSError: they are not there, or are another network's.
    """
    what = recipe.weights
    inner: Any = model.backbone if isinstance(model, EANet) else model.encoder
    if what == "pretrained":
        if isinstance(model, EANet):
            donor = timm.create_model(f"{recipe.model.removeprefix('eanet_')}s", True, num_classes=0)
        else:
            donor: Any = build(recipe, ["", ""], pretrained=True)
            donor = donor.encoder
        inner.load_state_dict(donor.state_dict())
        return
    begin_with(model, inner, what, ("fc.",) if isinstance(model, EANet) else ("head.",))


def predict(
    trained: Trained,
    source: Path,
    /,
    out: Path = Path("masks"),
    scales: tuple[float, ...] | None = None,
    flip: bool | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str = "auto",
) -> None:
    """Writes the class of every pixel of every image of SOURCE: to OUT, an indexed PNG of its size each.

    A value is the number of a class from 0, in the order of OUT/classes.txt. The same command, given again
    after an interruption, goes on where it stood: masks that this network has written in this way are kept.
    Images that cannot be read are listed in OUT/skipped.json.

    Args:
        source: an image, or a folder with all below it.
        out: a folder.
        scales: at which an image is looked at (default: the run's).
        flip: look at its mirror image too (default: as the run).
        window: side of the windows in which larger images are looked at (default: the run's).
        stride: pixels from a window to the next (default: two thirds of the window).
        device: auto, cpu or cuda.
    """
    own: Recipe = trained.recipe
    recipe = replace(
        own,
        scales=own.scales if scales is None else scales,
        eval_flip=own.eval_flip if flip is None else flip,
        window=own.window if window is None else window,
        stride=own.stride if window is None and stride is None else stride,
    ).checked()
    images = names_of(source, out)
    mark = trained.mark(trained.classes, recipe.scales, recipe.eval_flip, recipe.window, recipe.stride)
    trained = trained.on(device)
    skipped, kept = [], 0
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in trained.classes), encoding="utf-8")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata in images that it reads well
        for name, path in images.items():
            if mark_of(out / name) == mark:
                kept += 1
                continue
            try:
                with Image.open(path) as opened:
                    pixels = np.array(to_rgb(opened))
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
                skipped.append({"path": str(path), "reason": reason(error, path)})
                continue
            seen = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            write_mask(out / name, classes_of(trained.model, seen, recipe), mark)
    (out / "skipped.json").write_text(json.dumps(skipped, indent=2) + "\n", encoding="utf-8")
    if len(skipped) == len(images):
        raise ValueError(
            f"source: expected an image that can be read in {source}, got none ({skipped[0]['path']}: "
            f"{skipped[0]['reason']}); check the files"
        )
    told = f", {len(skipped)} unreadable, listed in {out / 'skipped.json'}" if skipped else ""
    print(f"{out}: {len(images) - len(skipped)} masks, {kept} of them from before{told}")

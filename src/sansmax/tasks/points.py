"""Point clouds: what each is, or, where that is known, which part of it each point belongs to."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import create_model
from ._data.draws import Part, generator, order
from ._data.point_views import View, changed, view
from ._data.points import KEPT, Clouds, open_clouds, shape_of
from ._point_pictures import colours, curve, scatters
from ._recipes.points import Recipe
from ._task import Picture, Task, Trained, rows

__all__ = ["Parts", "Points", "Recipe", "Seen", "build", "open_task", "predict"]

CURVE = (1024, 512, 256, 128, 64)  # points of the accuracy's curve
CURVE_CLOUDS = 512  # that it is drawn from
SHOWN = 12


@dataclass(frozen=True)
class Seen:
    """Held-out clouds: inputs of the network, labels (B,), parts (B, N) or -1, positions (B,)."""

    inputs: dict[str, Tensor]
    labels: Tensor
    parts: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class Points(Task):
    """Classification: cross-entropy with smoothed labels.

    overall accuracy = share of the clouds; mean class accuracy = mean of the classes' shares.
    """

    unit = "clouds"
    figures: Mapping[str, str] = MappingProxyType(
        {"accuracy": "overall accuracy, %", "class_accuracy": "mean class accuracy, %", "loss": "loss"}
    )

    def __init__(self, clouds: Clouds, recipe: Recipe, device: torch.device) -> None:
        self.clouds, self.recipe, self.device = clouds, recipe, device
        self.title, self.split, self.skipped = clouds.title, clouds.split, clouds.skipped
        self.classes = clouds.classes
        self.train_size, self.val_size = len(clouds.train), len(clouds.val)
        self._most = max(KEPT, 2 * recipe.points)  # no cloud has more

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Any, Tensor]]:
        recipe, shuffled = self.recipe, order(self.train_size, part.seed, epoch)
        first = recipe.augment.order == "first"
        for number in range(update, self.train_size // part.batch_size):
            batch = shuffled[number * part.batch_size :][: part.batch_size]
            name = ("view", epoch, number)
            scores = torch.rand(part.batch_size, self._most, generator=generator(part.seed, *name))
            whole = view(self.clouds.train, batch, recipe.points, scores, first)
            for micro in range(part.accumulate):
                mine = part.rows(torch.arange(part.batch_size), micro)
                chance = generator(part.seed, *name, "change")
                seen = changed(_rows(whole, mine), recipe.augment, chance, mine, part.batch_size)
                yield self.inputs(seen), self.targets(seen).to(self.device)

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Seen]:
        for index in torch.arange(self.val_size)[rank::world].split(batch_size):
            if len(index):
                yield self.seen(index)

    def seen(self, index: Tensor, vote: int = 0, points: int | None = None) -> Seen:
        """The held-out clouds of these numbers; `vote` counts the passes, of which the first changes
        nothing."""
        recipe = self.recipe
        scores = None
        if recipe.augment.order == "random" or (vote and recipe.kind == "classification"):
            # One order for all clouds: what is seen of one does not depend on its batch-mates. The parts of
            # a cloud are asked of the same points in every pass.
            which = vote if recipe.kind == "classification" else 0
            scores = torch.rand(1, self._most, generator=generator(recipe.seed, "held out", which))
        found = view(self.clouds.val, index, points or recipe.points, scores)
        labels, parts = found.labels.to(self.device), found.parts.to(self.device)
        return Seen(self.inputs(self.scaled(found, vote)), labels, parts, index)

    def scaled(self, seen: View, vote: int) -> View:
        """As the pass of this number scales them; the first leaves them as they are."""
        if not vote:
            return seen
        low, high = self.recipe.augment.scale
        chance = torch.rand(3, generator=generator(self.recipe.seed, "scale", vote))
        return replace(seen, points=seen.points * (low + (high - low) * chance))

    def inputs(self, seen: View) -> dict[str, Tensor]:
        """What the network takes, on the device."""
        given = {"points": seen.points}
        if seen.mask is not None:
            given["mask"] = seen.mask
        return {name: tensor.to(self.device) for name, tensor in given.items()}

    def targets(self, seen: View) -> Tensor:
        """What `loss` compares with."""
        return seen.labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # PyTorch's smoothing s gives s / classes to every class, the right one too.
        count = outputs.shape[1]
        smoothing = min(1.0, self.recipe.smoothing * count / max(1, count - 1))
        return F.cross_entropy(outputs.float(), targets, ignore_index=-1, label_smoothing=smoothing)

    def outputs(self, network: nn.Module, batch: Seen) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits; of several votes the logarithm of the mean probability."""
        others = [self.seen(batch.positions, vote).inputs for vote in range(1, self.recipe.votes)]
        return mean_of_passes([network(inputs) for inputs in (batch.inputs, *others)])

    def verdict(self, outputs: Tensor, batch: Seen) -> Tensor:
        """position, class, predicted class, -ln p(class)."""
        loss = F.cross_entropy(outputs.float(), batch.labels, reduction="none")
        return rows(batch.positions, batch.labels, outputs.argmax(1), loss)

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        labels, right = verdicts[:, 1], (verdicts[:, 1] == verdicts[:, 2]).double()
        return {
            "accuracy": right.mean().item(),
            "class_accuracy": _mean_of_classes(labels, right),
            "loss": verdicts[:, 3].mean().item(),
        }

    def about(self) -> dict[str, Any]:
        return {"kind": self.recipe.kind, "points": self.recipe.points}

    def example(self) -> dict[str, Tensor]:
        return {"points": self.seen(torch.arange(1)).inputs["points"].cpu()}

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """Held-out clouds, and what fewer points cost."""
        return [self.shown(network, verdicts), self.curve(network)]

    def shown(self, network: nn.Module, verdicts: Tensor) -> Picture:
        """Held-out clouds with truth and prediction."""
        wrong = (verdicts[:, 1] != verdicts[:, 2]).nonzero()[:, 0]
        picked = [*wrong[_spread(len(wrong), 4)].tolist(), *self._of_all_classes(SHOWN)]
        panels = []
        for position in sorted(list(dict.fromkeys(picked))[:SHOWN], key=lambda i: verdicts[i, 1].item()):
            truth, guess = (self.classes[int(number)] for number in verdicts[position, 1:3])
            xyz = self.seen(torch.tensor([position])).inputs["points"][0].cpu().numpy()
            colour = colours(verdicts[position, 1:2].long().expand(len(xyz)).numpy())
            title = truth if truth == guess else f"{guess}, not {truth}"
            panels.append((xyz, colour, title, truth == guess))
        image = scatters(panels, 4, self.recipe.augment.up)
        return Picture("Held-out clouds", image, "Red: what the network took for something else.")

    def _of_all_classes(self, most: int) -> list[int]:
        """Positions of so many held-out clouds, equally far apart in the order of their classes."""
        by_class = self.clouds.val.labels.argsort(stable=True)
        return by_class[_spread(self.val_size, most)].tolist()

    def curve(self, network: nn.Module) -> Picture:
        """The first figure against the number of points."""
        most = min(self.recipe.points, int(self.clouds.val.counts.max()))
        counts = [most] + [count for count in CURVE if count < most]
        index = _spread(self.val_size, CURVE_CLOUDS)
        values = []
        for count in counts:
            found = []
            for some in index.split(32):
                batch = self.seen(some, points=count)
                found.append(self.verdict(network(batch.inputs), batch))
            values.append(100 * self.scores(torch.cat(found))[self.score])
        title = self.figures[self.score].removesuffix(", %")
        return Picture(
            "What fewer points cost",
            curve(counts, values, f"{title} [%]"),
            f"{len(index)} held-out clouds, as they are; learned with {self.recipe.points} points.",
        )


class Parts(Points):
    """Part segmentation, with the shape's class as an input: cross-entropy of every point over all parts.

    A point's part is the most probable one of those that its shape's class has. Of a shape, IoU_part =
    |predicted and true| / |predicted or true|, 1 where both are empty, and its IoU the mean over the parts of
    its class. Instance mIoU = mean over the shapes; class mIoU = mean over the classes of the mean over their
    shapes (ShapeNet part; Yi et al., 2016, and PointNet's evaluation).
    """

    figures = MappingProxyType(
        {
            "instance_miou": "instance mIoU, %",
            "class_miou": "class mIoU, %",
            "accuracy": "accuracy of points, %",
            "loss": "loss",
        }
    )

    def __init__(self, clouds: Clouds, recipe: Recipe, device: torch.device) -> None:
        super().__init__(clouds, recipe, device)
        self.classes = clouds.parts
        self.shapes = clouds.classes
        self.own = own_parts(clouds.parts).to(device)

    def inputs(self, seen: View) -> dict[str, Tensor]:
        return {**super().inputs(seen), "label": seen.labels.to(self.device)}

    def targets(self, seen: View) -> Tensor:
        return seen.parts

    def verdict(self, outputs: Tensor, batch: Seen) -> Tensor:
        """position, class, mean IoU of its parts, share of right points, mean of -ln p(part)."""
        parts, here = batch.parts, batch.parts >= 0
        number, owned = here.sum(1), self.own[batch.labels]
        loss = F.cross_entropy(outputs.float(), parts, reduction="none", ignore_index=-1)
        iou = shape_iou(likeliest(outputs, owned), parts, owned)
        right = ((likeliest(outputs, owned) == parts) & here).sum(1) / number
        return rows(batch.positions, batch.labels, iou, right, loss.sum(1) / number)

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        _, labels, iou, right, loss = verdicts.unbind(1)
        return {
            "instance_miou": iou.mean().item(),
            "class_miou": _mean_of_classes(labels, iou),
            "accuracy": right.mean().item(),
            "loss": loss.mean().item(),
        }

    def example(self) -> dict[str, Tensor]:
        return {**super().example(), "label": torch.zeros(1, dtype=torch.int64)}

    def shown(self, network: nn.Module, verdicts: Tensor) -> Picture:
        panels = []
        for position in self._of_all_classes(SHOWN // 2):
            batch = self.seen(torch.tensor([position]))
            owned = self.own[batch.labels]
            guess = likeliest(self.outputs(network, batch), owned)[0].cpu()
            # Parts of a class are numbered through: the first is the smallest.
            first = int(owned[0].long().argmax())
            xyz, truth = batch.inputs["points"][0].cpu().numpy(), batch.parts[0].cpu()
            name, iou = self.shapes[int(batch.labels)], verdicts[position, 2].item()
            panels.append((xyz, colours((truth - first).numpy()), f"{name}: truth", True))
            panels.append((xyz, colours((guess - first).numpy()), f"IoU {100 * iou:.0f} %", True))
        image = scatters(panels, 4, self.recipe.augment.up)
        return Picture(
            "Held-out clouds by part", image, "Left of each pair: the truth; right: the prediction."
        )


def own_parts(parts: list[str]) -> Tensor:
    """(classes, parts) bool: which of "Class/part" are whose."""
    shapes = list(dict.fromkeys(map(shape_of, parts)))
    return torch.tensor([[shape_of(part) == shape for part in parts] for shape in shapes])


def mean_of_passes(logits: Sequence[Tensor]) -> Tensor:
    """The logits of one pass; of several the logarithm of their mean probability, (B, classes, ...)."""
    if len(logits) == 1:
        return logits[0]
    logs = torch.stack([one.float().log_softmax(1) for one in logits])
    return logs.logsumexp(0) - math.log(len(logits))


def likeliest(outputs: Tensor, owned: Tensor) -> Tensor:
    """Logits (B, parts, N), owned (B, parts) -> the most probable part among the owned ones, (B, N)."""
    return outputs.float().masked_fill(~owned[:, :, None], -math.inf).argmax(1)


def shape_iou(guess: Tensor, truth: Tensor, owned: Tensor) -> Tensor:
    """guess and truth (B, N), of which -1 does not count, owned (B, parts) -> mean IoU of each shape (B,)."""
    count, parts = owned.shape
    cell = torch.arange(count, device=guess.device)[:, None] * parts**2 + truth * parts + guess
    pairs = cell[truth >= 0].bincount(minlength=count * parts**2).view(count, parts, parts).double()
    both = pairs.diagonal(dim1=1, dim2=2)
    either = pairs.sum(1) + pairs.sum(2) - both
    iou = torch.where(either > 0, both / either.clamp(min=1), 1)
    return (iou * owned).sum(1) / owned.sum(1)


def _mean_of_classes(labels: Tensor, values: Tensor) -> float:
    return torch.stack([values[labels == label].mean() for label in labels.unique()]).mean().item()


def _spread(count: int, most: int) -> Tensor:
    """At most so many of 0 to count - 1, equally far apart."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def _rows(seen: View, rows: Tensor) -> View:
    mask = None if seen.mask is None else seen.mask[rows]
    return View(seen.points[rows], seen.parts[rows], mask, seen.labels[rows])


def open_task(recipe: Recipe, device: torch.device) -> Points:
    """Reads the clouds."""
    parts = recipe.kind == "parts"
    return (Parts if parts else Points)(open_clouds(recipe.data, recipe.points, parts), recipe, device)


def build(recipe: Recipe, classes: list[str]) -> nn.Module:
    """The network, with random weights; it takes the dictionary of its arguments too."""
    words: dict[str, Any] = {"num_classes": len(classes)}
    if recipe.kind == "parts":
        words["num_categories"] = len(dict.fromkeys(map(shape_of, classes)))
    try:
        network = create_model(recipe.model, recipe.mechanism, **words | recipe.model_args)
    except TypeError as error:
        raise ValueError(
            f"model_args: expected words that {recipe.model} takes, got {' '.join(str(error).split())}; "
            "check them"
        ) from None
    network.register_forward_pre_hook(_unpacked, with_kwargs=True)
    return network


def _unpacked(_: nn.Module, given: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, Any]:
    return ((), {**given[0], **words}) if given and isinstance(given[0], dict) else (given, words)


def predict(
    trained: Trained,
    source: Path,
    /,
    out: Path | None = None,
    votes: int | None = None,
    category: str = "",
    form: Literal["npz", "ply"] = "npz",
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Writes what the clouds of SOURCE are, a row each; of a run of kind parts, a file of each with the part
    of every point.

    Args:
        source: a cloud, or a folder with all below it: .ply, .off, .npy, .npz, .txt, .xyz, .h5.
        out: a .csv file (clouds.csv), or a folder for the parts (parts).
        votes: passes whose probabilities are averaged; None: as in the run.
        category: of the shapes, for parts; empty: the name of a cloud's folder.
        form: of the parts' files.
        batch_size: clouds that the network takes at a time.
        device: auto, cpu or cuda.
    """
    from ._point_predictions import classify, segment

    trained = trained.on(device)
    if trained.recipe.kind == "parts":
        segment(trained, source, out or Path("parts"), votes, category, form, batch_size)
    else:
        classify(trained, source, out or Path("clouds.csv"), votes, batch_size)

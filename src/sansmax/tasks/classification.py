"""Which class an image belongs to: batches, loss, evaluation."""

from collections.abc import Iterator
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._data.batches import Batch, Source
from ._data.draws import Part
from ._data.settings import Augment
from ._data.views import Mixing, erase
from ._recipes.classification import Recipe
from ._task import Task, rows

__all__ = ["Classification", "Recipe", "Teacher"]


class Teacher:
    """A trained network whose opinion of the same images is learned too.

    loss = (1 - alpha) * loss of the labels + alpha * loss of the teacher, which is cross-entropy with its
    first choice (hard), or tau^2 * KL(teacher || student) at temperature tau (soft). A network that returns
    two outputs in training (DeiT's distillation token) learns the labels with the first, the teacher with
    the second.
    Source: DeiT (https://arxiv.org/abs/2012.12877), section 4, equations 2 and 3. Its published code
    divides the soft loss by the number of classes besides, so that of 1000 classes a thousandth is left;
    the paper's is here.

    `imitated` adds weight * mean |student - teacher|^2 / mean |teacher - mean of teacher|^2 of what the
    classifiers of both are given, the mean of the teacher over the batch.
    """

    def __init__(self, model: nn.Module, kind: str = "hard", alpha: float = 0.5, tau: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.kind, self.alpha, self.tau = kind, alpha, tau
        self.features, self._seen = 0.0, dict[str, Tensor]()

    def imitated(self, student: nn.Module, classified: nn.Module, weight: float) -> Self:
        """Itself, after which features are learned too.

        Args:
            student: the network that learns.
            classified: the teacher's network, within `model`.

        Raises:
            ValueError: one of them has no single classifier, or they are not of equal width.
        """
        own, its = (_classifier(network) for network in (student, classified))
        if own.in_features != its.in_features:
            raise ValueError(
                f"distil.features: expected a teacher whose features are {own.in_features} wide, got "
                f"{its.in_features}; leave it out"
            )
        self.features, seen = weight, self._seen

        def note(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            # The moving average of a student is a copy of it, hooks included, in evaluation mode.
            if name == "teacher" or layer.training:
                seen[name] = args[0]

        own.register_forward_pre_hook(partial(note, "student"))
        its.register_forward_pre_hook(partial(note, "teacher"))
        return self

    @torch.no_grad()
    def opinion(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes), and features (B, width) if they are learned."""
        logits = self.model(images)
        return (logits, self._seen.pop("teacher")) if self.features else (logits,)

    def distance(self, features: Tensor) -> Tensor:
        """Of the student's newest features from these, as a share of their spread."""
        wanted = features.float()
        spread = (wanted - wanted.mean(0)).square().mean()
        return (self._seen.pop("student").float() - wanted).square().mean() / spread.clamp(min=1e-12)

    def loss(self, outputs: Tensor, opinion: Tensor) -> Tensor:
        """Of the student's logits, mean over the batch."""
        if self.kind == "hard":
            return F.cross_entropy(outputs, opinion.argmax(1))
        student, teacher = ((x.float() / self.tau).log_softmax(1) for x in (outputs, opinion))
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.tau**2


def _classifier(network: Any) -> nn.Linear:
    found = network.get_classifier() if hasattr(network, "get_classifier") else None
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"distil.features: expected networks with one linear classifier, got {type(network).__name__} "
            f"with {type(found).__name__}; leave it out"
        )
    return found


class Classification(Task):
    """Cross-entropy on the images of a source; inputs are normalised.

    Args:
        source: see sansmax.tasks._data.batches.
        augment: of training images.
        teacher: learned from besides the labels.
    """

    figures = MappingProxyType({"top1": "top-1, %", "top5": "top-5, %", "loss": "loss"})

    def __init__(self, source: Source, augment: Augment, teacher: Teacher | None = None) -> None:
        self.source, self.augment, self.teacher = source, augment, teacher
        self.classes = source.classes
        self.train_size, self.val_size = source.train_size, source.val_size
        self._mixing = Mixing(augment, len(self.classes)) if augment.mixup or augment.cutmix else None

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.title

    @property
    def split(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.split

    @property
    def skipped(self) -> list[dict[str, str]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.skipped

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Tensor, Any]]:
        """Inputs and targets for `loss`: this process's pieces of the epoch, from its update `update` on."""
        updates = self.train_size // part.batch_size
        for number, batch in enumerate(self.source.train(epoch, update, part), update * part.accumulate):
            yield self._changed(batch, part.seed, epoch * updates + number // part.accumulate)

    def _changed(self, batch: Batch, seed: int, update: int) -> tuple[Tensor, Any]:
        images, labels = batch.images, batch.labels
        if self.augment.reprob:
            images = erase(images, batch.boxes, seed, update)
        if self._mixing is not None:
            images, labels = self._mixing(images, labels, seed, update)
        return images, labels if self.teacher is None else (labels, *self.teacher.opinion(images))

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        """This process's share of the held-out images."""
        return self.source.val(rank, world, batch_size)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean cross-entropy of logits (B, classes) with labels (B,) or shares of classes (B, classes), and
        what the teacher adds."""
        first, second = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        labels, *opinion = targets if self.teacher is not None else (targets,)
        # Mixed targets are smoothed already.
        smoothing = self.augment.smoothing if labels.ndim == 1 else 0.0
        base = F.cross_entropy(first.float(), labels, label_smoothing=smoothing)
        if self.teacher is None:
            return base
        taught = self.teacher.loss(second.float(), opinion[0])
        loss = (1 - self.teacher.alpha) * base + self.teacher.alpha * taught
        if self.teacher.features:
            loss = loss + self.teacher.features * self.teacher.distance(opinion[1])
        return loss

    def verdict(self, outputs: Any, batch: Batch) -> Tensor:
        """What an evaluation keeps of each image, (B, 4 + 2 k) float64: position, label, cross-entropy, the
        label's probability, then the k <= 5 most probable classes and their probabilities."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(
                f"model: expected logits (B, classes) in evaluation, got "
                f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}; choose "
                "a network that classifies images"
            )
        logs = outputs.float().log_softmax(1)
        truth = logs.gather(1, batch.labels[:, None])
        top = logs.exp().topk(min(5, logs.shape[1]), 1)
        return rows(batch.positions, batch.labels, -truth, truth.exp(), top.indices, top.values)

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        """top1, top5 (where there are more than five classes) and the mean cross-entropy."""
        labels, top = verdicts[:, 1:2], verdicts[:, 4 : 4 + (verdicts.shape[1] - 4) // 2]
        found = {"top1": (top[:, :1] == labels).double().mean().item()}
        if len(self.classes) > 5:
            found["top5"] = (top == labels).any(1).double().mean().item()
        return {**found, "loss": verdicts[:, 2].mean().item()}

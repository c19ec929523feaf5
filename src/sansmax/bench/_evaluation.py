"""What an evaluation says of a network: its confusions, its classes, how sure it is, and with whom it
agrees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import multiclass_confusion_matrix

__all__ = ["Agreement", "Bin", "ClassFigures", "Evaluation", "agreement", "refusal"]

BINS = 15


class Bin(NamedTuple):
    """Images whose highest probability lies in (low, high]: how many, their mean of it, the share right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class ClassFigures(NamedTuple):
    """One class: its images, how many are right, the predictions of it, the mean probability of the truth,
    and the class that its images are most often taken for, with their count."""

    name: str
    images: int
    right: int
    predicted: int
    probability: float
    taken_for: str | None
    taken: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images


@dataclass(frozen=True)
class Evaluation:
    """evaluation.npz: labels (N,), top (N, k) classes by falling probability, probabilities (N, k), truth
    (N,).

    Raises:
        ValueError: the shapes or the classes do not go together.
    """

    labels: NDArray[np.int64]
    top: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    truth: NDArray[np.float32]
    classes: Sequence[str]

    def __post_init__(self) -> None:
        images, top = self.labels.shape, self.top.shape
        if not (
            len(images) == 1
            and len(top) == 2
            and images == top[:1] == self.truth.shape
            and top == self.probabilities.shape
            and top[1]
            and min(self.labels.min(initial=0), self.top.min(initial=0)) >= 0
            and max(self.labels.max(initial=0), self.top.max(initial=0)) < len(self.classes)
        ):
            raise ValueError(
                f"evaluation.npz: expected labels (N,), top and probabilities (N, k) and truth (N,) of "
                f"{len(self.classes)} classes, got {images}, {top}, {self.probabilities.shape} and "
                f"{self.truth.shape}; evaluate the run again"
            )

    @property
    def predicted(self) -> NDArray[np.int64]:
        return self.top[:, 0]

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.predicted == self.labels

    def reliability(self) -> list[Bin]:
        """15 bins of equal width, (0, 1/15] to (14/15, 1], those without images too."""
        confidence, right = self.probabilities[:, 0].astype(float), self.right
        # Not of torchmetrics: it gives no bins, and keeps a bin of its own for a confidence of exactly 1.
        index = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
        counts = np.bincount(index, minlength=BINS)
        sums = [np.bincount(index, weights, minlength=BINS) for weights in (confidence, right)]
        means = [np.divide(s, counts, out=np.zeros(BINS), where=counts > 0) for s in sums]
        return [
            Bin(b / BINS, (b + 1) / BINS, int(counts[b]), float(means[0][b]), float(means[1][b]))
            for b in range(BINS)
        ]

    def calibration_error(self) -> float:
        """The expected calibration error over the B = 15 bins of `reliability`,

            ECE = sum_b n_b / N |accuracy_b - confidence_b|,

        n_b images, the share of them that is right, and the mean of their highest probability
        (Guo et al., On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599).
        """
        return sum(b.count * abs(b.accuracy - b.confidence) for b in self.reliability()) / len(self.labels)

    def confusions(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) of every mistake that was made, the most frequent first."""
        wrong = ~self.right
        pairs, counts = np.unique(
            np.stack([self.labels[wrong], self.predicted[wrong]]), axis=1, return_counts=True
        )
        found = [(int(a), int(b), int(n)) for a, b, n in zip(*pairs, counts, strict=True)]
        return sorted(found, key=lambda pair: (-pair[2], pair))

    def confusion_matrix(self, limit: int = 30) -> tuple[list[int], NDArray[np.int64]]:
        """The classes shown, in their order, and their images by true class and by predicted class, of which
        the last column is all classes that are not shown: (shown, (n, n + 1)).

        All classes, or the `limit` that take part in the most mistakes.
        """
        shown = np.arange(len(self.classes))
        if len(shown) > limit:
            wrong = ~self.right
            mistakes = np.bincount(
                np.concatenate([self.labels[wrong], self.predicted[wrong]]), minlength=len(shown)
            )
            most = np.argsort(-mistakes, kind="stable")[:limit]
            shown = np.sort(most[mistakes[most] > 0])
        place = np.full(len(self.classes), len(shown))
        place[shown] = np.arange(len(shown))
        matrix = multiclass_confusion_matrix(
            torch.from_numpy(place[self.predicted]),
            torch.from_numpy(place[self.labels]),
            max(2, len(shown) + 1),
        )
        return shown.tolist(), matrix.numpy()[: len(shown), : len(shown) + 1]

    def by_class(self) -> list[ClassFigures]:
        """The classes of which there are images, the least accurate first."""
        count = len(self.classes)
        images, right, predicted = (
            np.bincount(c, minlength=count) for c in (self.labels, self.labels[self.right], self.predicted)
        )
        probability = np.bincount(self.labels, self.truth, minlength=count)
        taken: dict[int, tuple[int, int]] = {}
        for truth, other, n in self.confusions():
            taken.setdefault(truth, (other, n))
        found = []
        for c in np.flatnonzero(images).tolist():
            other, n = taken.get(c, (None, 0))
            found.append(
                ClassFigures(
                    self.classes[c],
                    int(images[c]),
                    int(right[c]),
                    int(predicted[c]),
                    float(probability[c] / images[c]),
                    None if other is None else self.classes[other],
                    n,
                )
            )
        return sorted(found, key=lambda figures: figures.accuracy)


class Agreement(NamedTuple):
    """Shares of the images on which both are right, the first alone, the second alone, neither; of those
    that get the same answer; and the p-value of McNemar's exact test."""

    both: float
    first: float
    second: float
    neither: float
    same: float
    p: float


def refusal(first: Evaluation | None, second: Evaluation | None) -> str | None:
    """Why the predictions of two runs cannot be compared image by image; None where they can."""
    if first is None or second is None:
        return "not evaluated"
    if list(first.classes) != list(second.classes):
        return f"other classes ({len(first.classes)} and {len(second.classes)})"
    if not np.array_equal(first.labels, second.labels):
        return f"other images ({len(first.labels):,} and {len(second.labels):,})"
    return None


def agreement(first: Evaluation, second: Evaluation) -> Agreement:
    """Of two evaluations of the same images.

    With b images on which the first alone is right and c with the second alone, p = P(X <= min(b, c) or
    X >= max(b, c)) for X ~ Binomial(b + c, 1/2): how often chance alone makes them differ so much (McNemar
    1947).
    """
    from scipy.stats import binomtest

    a, b = first.right, second.right
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    differing = only_first + only_second
    return Agreement(
        float((a & b).mean()),
        float((a & ~b).mean()),
        float((~a & b).mean()),
        float((~a & ~b).mean()),
        float((first.predicted == second.predicted).mean()),
        float(binomtest(only_first, differing).pvalue) if differing else 1.0,
    )

"""Images that were never there: a generator and a discriminator that learn from each other.

The discriminator minimises mean max(0, 1 - D(x)) + mean max(0, 1 + D(G(z))) over real and generated images,
the generator -mean D(G(z)) (hinge loss: SAGAN, equation 4).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import GAN
from ..models._gan import Turn
from ._data import Images
from ._data.draws import Part, generator, order
from ._drawn import as_bytes, samples
from ._features import Features, Inception, OwnClassifier, fidelity
from ._pictures import grid
from ._recipes.generation import Recipe
from ._run import at_least, positive
from ._small_images import as_pictures, whole_images, write_table
from ._task import Picture, Task, Trained, rows

__all__ = ["Generation", "Held", "Recipe", "build", "generate", "open_task", "predict"]

OWN = MappingProxyType(
    {
        "kid": "KID (own classifier)",
        "frechet": "Fréchet distance (own classifier)",
        "class_score": "class score (own classifier)",
    }
)
PUBLISHED = MappingProxyType({"fid": "FID", "kid": "KID", "class_score": "IS"})
ASKED = MappingProxyType({"accuracy": "in the class asked for, %"})
BALANCE = MappingProxyType({"margin": "margin", "diversity": "diversity"})
NOT_COMPARABLE = "by the run's own classifier, so not to be compared with published figures"

SUBSETS, SUBSET, SPLITS = 100, 1000, 10  # of KID and IS, as published
PAIRED = 1000  # images of a class among which distances are taken
SHOWN_CLASSES, SHOWN, STEPS = 10, 10, 10  # of the report


@dataclass(frozen=True)
class Held:
    """Held-out images, and what is generated beside them: inputs, classes (B,), positions (B,)."""

    inputs: Turn
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class Generation(Task):
    """Figures of as many generated images as there are held-out ones, of the same classes, in 256 values.

    kid: the squared maximum mean discrepancy of features under the kernel (<x, y> / F + 1)^3, mean of 100
    subsets of 1,000 (of fewer images: of all at once). frechet, fid: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))
    of their means and covariances. class_score, IS: exp of the mean KL(p(class | image) | p(class)), of ten
    parts with Inception. All are torch-fidelity's.
    accuracy: the share that the classifier sees in the class that was asked for.
    margin: mean D(x) - mean D(G(z)), both held out; 0: it cannot tell them, large: the generator is lost.
    diversity: mean over the classes of the mean distance between features of two generated images, over that
    of two real ones; 1: as different as the data, 0: all alike. NaN where no class has two held-out images.
    """

    higher = False

    def __init__(self, images: Images, recipe: Recipe, device: torch.device) -> None:
        if len(images.val_images) < 2:
            raise ValueError(
                f"data: expected at least 2 held-out images, got {len(images.val_images)}; hold out more"
            )
        fidelity()
        self.images, self.recipe, self.device = images, recipe, device
        self.title, self.split, self.classes = images.name, images.split, images.classes
        self.skipped = list(images.skipped)
        self.train_size, self.val_size = len(images.train_images), len(images.val_images)
        if recipe.inception:
            self.features: Features = Inception(recipe.inception, device)
        elif len(self.classes) < 2:
            raise ValueError(
                "data: expected at least 2 classes, for the classifier that judges, got "
                f"{len(self.classes)}; give more, or --inception"
            )
        else:
            self.features = OwnClassifier(images, recipe.seed, device)
        asked = {} if recipe.inception or not recipe.conditional else ASKED
        self.figures: Mapping[str, str] = MappingProxyType(
            {**(PUBLISHED if recipe.inception else OWN), **asked, **BALANCE}
        )

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Turn, Tensor | None]]:
        recipe, entries = self.recipe, order(self.train_size, part.seed, epoch)
        updates = self.train_size // part.batch_size
        for number in range(update, updates):
            chance = generator(part.seed, "noise", epoch, number)
            noise = torch.randn(part.batch_size, recipe.latent_dim, generator=chance)
            wanted = torch.randint(len(self.classes), (part.batch_size,), generator=chance)
            flip = torch.rand(part.batch_size, generator=chance) < recipe.hflip
            index = entries[number * part.batch_size :][: part.batch_size]
            for micro in range(part.accumulate):
                z, fakes, mirrored, real = (part.rows(x, micro) for x in (noise, wanted, flip, index))
                z, fakes = z.to(self.device), self._given(fakes)
                if recipe.turn(epoch * updates + number):
                    yield Turn(None, None, z, fakes), None
                    continue
                pixels = self.images.train_images[real]
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
                labels = self._given(self.images.train_labels[real])
                signs = torch.tensor([1.0, -1.0], device=self.device).repeat_interleave(len(real))
                yield Turn(self._scaled(pixels), labels, z, fakes), signs

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Held]:
        for index in torch.arange(self.val_size)[rank::world].split(batch_size):
            labels = self.images.val_labels[index]
            noise = torch.stack([self._noise(position) for position in index.tolist()]).to(self.device)
            given = self._given(labels)
            yield Held(Turn(self._scaled(self.images.val_images[index]), given, noise, given), labels, index)

    def _noise(self, position: int) -> Tensor:
        return torch.randn(
            self.recipe.latent_dim, generator=generator(self.recipe.seed, "held-out", position)
        )

    def _given(self, labels: Tensor) -> Tensor | None:
        return labels.to(self.device) if self.recipe.conditional else None

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, torch.float32) / 127.5 - 1

    def loss(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        scores = outputs.float()
        return -scores.mean() if targets is None else 2 * F.relu(1 - targets * scores).mean()

    def outputs(self, network: nn.Module, batch: Any) -> Tensor:
        """(B, 3 + 2 F + K): D(x), D(G(z)), whether the classifier knows x; features of x and of G(z), logits
        of G(z)."""
        gan, turn = network, batch.inputs
        fakes = gan.generator(turn.noise, turn.wanted)  # pyright: ignore[reportCallIssue]
        judged = [gan.discriminator(x, turn.wanted) for x in (turn.images, fakes)]  # pyright: ignore
        real, guess = self.features(self.images.val_images[batch.positions].to(self.device))
        fake, logits = self.features(as_bytes(fakes))
        known = guess.argmax(1) == batch.labels.to(self.device)
        return torch.cat([torch.stack([*judged, known], 1), real, fake, logits], 1).float()

    def verdict(self, outputs: Tensor, batch: Held) -> Tensor:
        """position, class, and the outputs."""
        return rows(batch.positions, batch.labels, outputs)

    def _parts(self, verdicts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Class, D(x), D(G(z)), known, features of x, of G(z), logits."""
        dim = self.features.dim
        single, real, fake, logits = verdicts.split([5, dim, dim, verdicts.shape[1] - 5 - 2 * dim], 1)
        _, labels, *judged = single.unbind(1)
        return labels.long(), *judged, real, fake, logits  # pyright: ignore[reportReturnType]

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        fid, isc, kid = fidelity()
        labels, real_score, fake_score, _, real, fake, logits = self._parts(verdicts)
        count, published = len(labels), bool(self.recipe.inception)
        subset = min(SUBSET, count)
        words = {"kid_subsets": SUBSETS if count > subset else 1, "kid_subset_size": subset}
        found = {
            "kid": kid.kid_features_to_metric(real, fake, **words, verbose=False)[kid.KEY_METRIC_KID_MEAN]
        }
        statistics = [fid.fid_features_to_statistics(x) for x in (real, fake)]
        distance = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
        found["fid" if published else "frechet"] = distance
        splits = min(SPLITS, count) if published else 1
        found["class_score"] = isc.isc_features_to_metric(logits, splits)[isc.KEY_METRIC_ISC_MEAN]
        if "accuracy" in self.figures:
            found["accuracy"] = (logits.argmax(1) == labels).double().mean().item()
        found["margin"] = (real_score - fake_score).mean().item()
        among = labels if self.recipe.conditional else torch.zeros_like(labels)
        found["diversity"] = spread(fake, among) / spread(real, among)
        return {name: found[name] for name in self.figures}

    def words(self, found: Mapping[str, float]) -> str:
        said = super().words(found)
        return said if self.recipe.inception else f"{said} ({NOT_COMPARABLE})"

    def details(self, verdicts: Tensor) -> dict[str, Any]:
        """Of the classifier: its top-1 on the held-out images, and of every class the share of generated
        images that it sees in it."""
        if self.recipe.inception:
            return {}
        labels, _, _, known, _, _, logits = self._parts(verdicts)
        told: dict[str, Any] = {"classifier_top1": known.mean().item()}
        if self.recipe.conditional:
            right = (logits.argmax(1) == labels).double()
            told["accuracy"] = {
                name: right[labels == i].mean().item() if (labels == i).any() else None
                for i, name in enumerate(self.classes)
            }
        return told

    def about(self) -> dict[str, Any]:
        return {
            "img_size": self.images.train_images.shape[-1],
            "in_chans": self.images.train_images.shape[1],
            "judged_by": "Inception" if self.recipe.inception else NOT_COMPARABLE,
        }

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """Samples, a row for every class; what lies between two noises, and between two classes."""
        maker: Any = network.generator
        kinds = list(range(min(SHOWN_CLASSES, len(self.classes)))) if self.recipe.conditional else []
        side = self.images.train_images.shape[-1]
        scale = max(1, 48 // side)
        sheet = samples(maker, SHOWN, kinds, self.recipe.seed)
        known = "" if self.recipe.inception else self._judge(verdicts)
        names = ", ".join(self.classes[kind] for kind in kinds)
        path = samples(maker, len(kinds) or SHOWN, kinds, self.recipe.seed, steps=STEPS)
        passed = "from one noise to another" + (" and from one class to the next" if kinds else "")
        return [
            Picture(
                "Samples",
                grid(as_pictures(sheet), SHOWN, scale=scale),
                (f"A row for every class: {names}. " if kinds else "") + known,
            ),
            Picture("Interpolation", grid(as_pictures(path), STEPS, scale=scale), f"Each row {passed}."),
        ]

    def _judge(self, verdicts: Tensor) -> str:
        top1 = self.details(verdicts)["classifier_top1"]
        return (
            f"Figures are {NOT_COMPARABLE}; it knows the class of {100 * top1:.1f} % of the held-out images."
        )


def spread(features: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the mean distance between two images of a class."""
    groups = (features[labels == label][:PAIRED] for label in labels.unique())
    means = [F.pdist(group).mean() for group in groups if len(group) > 1]
    return torch.stack(means).mean().item() if means else math.nan


def open_task(recipe: Recipe, device: torch.device) -> Generation:
    """Reads the images into memory, and trains the classifier that judges."""
    return Generation(whole_images(recipe.data, recipe.img_size), recipe, device)


def build(recipe: Recipe, classes: list[str]) -> GAN:
    """The networks, with random weights.

    Raises:
        ValueError: model_args hold a word that they do not take, or one that does not fit.
    """
    channels, side, _ = shape_of(recipe)
    try:
        return GAN(
            img_size=side,
            in_chans=channels,
            num_classes=len(classes) if recipe.conditional else 0,
            latent_dim=recipe.latent_dim,
            mechanism=recipe.mechanism,
            discriminator_lr_scale=recipe.d_lr_scale,
            **recipe.model_args,
        )
    except TypeError as error:
        raise ValueError(
            f"model_args: expected words that the networks take, got {' '.join(str(error).split())}; check "
            "them"
        ) from None


def shape_of(recipe: Recipe) -> tuple[int, int, int]:
    """Channels, height and width of its images."""
    side = recipe.img_size or 8
    return (1 if recipe.data.root == "digits" and not recipe.data.reader else 3), side, side


def predict(
    trained: Trained,
    source: Path,
    /,
    out: Path = Path("scores.csv"),
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Writes how real the discriminator finds each image of SOURCE, and as which class it finds it most real.

    Above 1 it is sure of a real image, below -1 of a generated one.

    Args:
        source: an image, or a folder with all below it; the centre square is taken.
        out: a .csv file: path, score, class (of networks with classes), error (why an image could not be
            read).
        batch_size: images that the network takes at a time.
        device: auto, cpu or cuda.
    """
    trained = trained.on(device)
    judge: Any = trained.model.discriminator

    def rate(images: Tensor) -> list[tuple[str, ...]]:
        score, projected = judge.parts(images.to(trained.device, torch.float32) / 127.5 - 1)
        if projected is None:
            return [(f"{one:.6g}",) for one in score.tolist()]
        best, kind = (score[:, None] + projected).max(1)
        return [
            (f"{one:.6g}", trained.classes[i]) for one, i in zip(best.tolist(), kind.tolist(), strict=True)
        ]

    columns = ("score", "class") if trained.recipe.conditional else ("score",)
    write_table(source, out, columns, shape_of(trained.recipe), batch_size, rate)


def generate(
    trained: Trained,
    /,
    count: int = 8,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    truncation: float | None = None,
    interpolate: int | None = None,
    out: Path = Path("samples.png"),
    device: str = "auto",
) -> None:
    """Draws images, a row for every class.

    Args:
        count: images of every class, or in all where the network knows none; with interpolate: rows.
        classes: names (default: all).
        seed: of the noise.
        truncation: draw noise within plus and minus this alone: below 2, fewer failures and less variety.
        interpolate: so many images in a row, from a noise to another and from a class to the next.
        out: a .png file.
        device: auto, cpu or cuda.
    """
    at_least(1, count=count)
    at_least(2, interpolate=interpolate)
    at_least(0, seed=seed)
    positive({"truncation": truncation})
    if out.suffix != ".png":
        raise ValueError(f"out: expected a file that ends in .png, got {out}; rename it")
    if classes and not trained.recipe.conditional:
        raise ValueError(f"classes: expected none of a network without, got {classes[0]}; leave them out")
    if unknown := sorted({*classes} - {*trained.classes}):
        raise ValueError(
            f"classes: expected some of {', '.join(trained.classes)}, got {unknown[0]!r}; name others"
        )
    kinds = [trained.classes.index(name) for name in classes or trained.classes]
    trained = trained.on(device)
    maker: Any = trained.model.generator
    drawn = samples(maker, count, kinds if trained.recipe.conditional else [], seed, truncation, interpolate)
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = interpolate or (count if trained.recipe.conditional else min(8, count))
    grid(as_pictures(drawn), columns).save(out)
    print(f"{out}: {len(drawn)} images")

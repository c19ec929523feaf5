"""What a run asks of a task. A file of this folder without a leading underscore is one; it has

    Recipe                      a run of it: a child of Run, from the file of that name in _recipes
    open_task(recipe, device)   its Task, with the data
    build(recipe, classes)      its network, with random weights, without the data
    predict(trained, source, out, ...)      what `sansmax predict` calls; further words are flags
    generate(trained, ...)      what `sansmax generate` calls, where there is something to generate
    load_weights(model, recipe)     the recipe's `weights` into a new network, where it can begin with some

Classification, whose network and teacher are looked for by train, has the Recipe alone.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ._data.device import pick_device
from ._data.draws import Part

__all__ = ["Batch", "Picture", "Task", "Trained", "rows"]


class Batch(Protocol):
    """Held-out samples on the device; a task adds what its verdicts need."""

    @property
    def inputs(self) -> Any:
        """What the network takes."""
        ...

    def __len__(self) -> int:
        """How many samples."""
        ...


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    title: str
    image: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class Trained:
    """A network of a run, in eval mode on its device, with what it was trained as."""

    model: nn.Module
    recipe: Any
    classes: list[str]
    device: torch.device

    def on(self, device: str) -> "Trained":
        """On auto, cpu or cuda."""
        where = pick_device(device)
        return replace(self, model=self.model.to(where), device=where)

    def mark(self, *how: Any) -> str:
        """A digest of the weights and of how the network is used."""
        found = hashlib.blake2b(repr(how).encode(), digest_size=16)
        for name, value in self.model.state_dict().items():
            found.update(name.encode())
            found.update(
                value.cpu().contiguous().view(torch.uint8).numpy() if value.ndim else repr(value).encode()
            )
        return found.hexdigest()


class Task:
    """Data, loss and evaluation of a run.

    Attributes:
        unit: of samples, in the plural.
        figures: what `scores` gives, and its name for people; a name that ends in ", %" is a share's. The
            first tells the best weights.
        higher: whether more of the first is better.
        title: of the data.
        split: how the held-out set was chosen, in words.
        skipped: samples that could not be used: path and reason.
    """

    unit = "images"
    figures: Mapping[str, str]
    higher = True
    title: str
    split: str
    classes: list[str]
    train_size: int
    val_size: int
    skipped: list[dict[str, str]]

    @property
    def used(self) -> int:
        """Held-out samples that could be evaluated."""
        return self.val_size - len(self.skipped)

    @property
    def score(self) -> str:
        """Of `scores`, what tells the best weights."""
        return next(iter(self.figures))

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets for `loss`, on the device: this process's pieces of the epoch, from its update
        `update` on. Every random choice follows from part.seed and the numbers of epoch and update."""
        raise NotImplementedError

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        """This process's share of the held-out samples, each once."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """What is made small."""
        raise NotImplementedError

    def outputs(self, network: nn.Module, batch: Batch) -> Any:
        """What the network, in eval mode, makes of a held-out batch."""
        return network(batch.inputs)

    def verdict(self, outputs: Any, batch: Any) -> Tensor:
        """What an evaluation keeps of a batch: rows on the CPU, float64, that begin with the position of
        their sample in the held-out set."""
        raise NotImplementedError

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        """Figures of the verdicts on all held-out samples, in the order of their positions."""
        raise NotImplementedError

    def words(self, found: Mapping[str, float]) -> str:
        """Of `scores`: "top-1 97.3 %, loss 0.1034"."""
        parts = []
        for name, title in self.figures.items():
            if name in found:
                share, value = title.endswith(", %"), found[name]
                said = f"{100 * value:.1f} %" if share else f"{value:.4g}"
                parts.append(f"{title.removesuffix(', %')} {said}")
        return ", ".join(parts)

    def details(self, verdicts: Tensor) -> dict[str, Any]:
        """What `sansmax eval --out` tells besides the figures; JSON."""
        return {}

    def about(self) -> dict[str, Any]:
        """What recipe.json tells of the network beyond its name and size."""
        return {}

    def example(self) -> Any:
        """An input of the network, of one sample, to count operations with; None: they are not counted."""
        return None

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """For the report; the network is in eval mode."""
        return []


def rows(positions: Tensor, *columns: Tensor) -> Tensor:
    """Verdicts: positions (B,) and columns (B,) or (B, k), as float64 on the CPU."""
    parts = [x.reshape(len(positions), -1).to("cpu", torch.float64) for x in (positions, *columns)]
    return torch.cat(parts, 1)

"""Which value the next sub-pixel has: images as sequences, learned and drawn by a causal network.

A C x H x W image is the sequence of its H W C values, row by row, pixel by pixel, channel by channel, each
one of 256 classes (AFT, arXiv 2105.14103, section 5.1: 3,072 of CIFAR-10). A token of its own goes before the
first.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Decoder
from ._causal import decoder
from ._data import Images
from ._data.draws import Part, generator, order
from ._data.folder import image_files
from ._data.sampling import Sampler
from ._pictures import grid
from ._recipes.pixels import Recipe
from ._run import at_least
from ._small_images import as_pictures, read_image, whole_images, write_table
from ._task import Picture, Task, Trained, rows

__all__ = ["Pixels", "Recipe", "Sequences", "build", "draw_images", "generate", "open_task", "predict"]

VALUES = 256
START = 256
SHOWN = 16


@dataclass(frozen=True)
class Sequences:
    """Held-out images: inputs (B, T), what is behind each (B, T), positions (B,)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


class Pixels(Task):
    """Cross-entropy with the next sub-pixel.

    bits per dimension = mean over the held-out images and their sub-pixels of -log2 p(value | those before).
    """

    figures = MappingProxyType({"bits": "bits per dimension", "loss": "loss"})
    higher = False

    def __init__(self, images: Images, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.title, self.split = images.name, images.split
        self.skipped = list(images.skipped)
        self.train_images, self.val_images = images.train_images, images.val_images
        self.shape = tuple(self.train_images.shape[1:])
        self.classes = [f"{'x'.join(map(str, self.shape))} sub-pixels"]
        self.train_size, self.val_size = len(self.train_images), len(self.val_images)

    def train_batches(self, epoch: int, update: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        entries = order(self.train_size, part.seed, epoch)
        for number in range(update, self.train_size // part.batch_size):
            index = entries[number * part.batch_size :][: part.batch_size]
            chance = torch.rand(2, part.batch_size, generator=generator(part.seed, "view", epoch, number))
            for micro in range(part.accumulate):
                flip, level = (part.rows(one, micro) for one in chance)
                pixels = self.train_images[part.rows(index, micro)]
                flip = (flip < self.recipe.hflip)[:, None, None, None]
                pixels = torch.where(flip, pixels.flip(-1), pixels).int()
                most = self.recipe.level
                added = (level * (2 * most + 1)).floor().int() - most
                pixels = (pixels + added[:, None, None, None]).clamp(0, VALUES - 1)
                yield _shifted(sequence(pixels).to(self.device))

    def val_batches(self, rank: int, world: int, batch_size: int) -> Iterator[Sequences]:
        for index in torch.arange(self.val_size)[rank::world].split(batch_size):
            yield Sequences(*_shifted(sequence(self.val_images[index]).to(self.device)), index)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float()[..., :VALUES].flatten(0, 1), targets.flatten())

    def verdict(self, outputs: Tensor, batch: Sequences) -> Tensor:
        """position, mean of -ln p over the image's sub-pixels."""
        return rows(batch.positions, nats(outputs, batch.targets).mean(1))

    def scores(self, verdicts: Tensor) -> dict[str, float]:
        loss = verdicts[:, 1].mean().item()
        return {"bits": loss / math.log(2), "loss": loss}

    def about(self) -> dict[str, Any]:
        return {"img_size": self.shape[-1], "in_chans": self.shape[0], "tokens": math.prod(self.shape)}

    def example(self) -> Tensor:
        return torch.zeros(1, math.prod(self.shape), dtype=torch.int64)

    def pictures(self, network: nn.Module, verdicts: Tensor) -> list[Picture]:
        """Samples, and held-out images whose lower half the network draws."""
        plain: Any = network
        before = time.perf_counter()
        samples = draw_images(plain, self.shape, SHOWN, self.device)
        seconds = (time.perf_counter() - before) / SHOWN
        truth = self.val_images[: SHOWN // 2]
        kept = self.shape[1] // 2
        drawn = draw_images(plain, self.shape, len(truth), self.device, given=truth[:, :, :kept])
        half = truth.clone()
        half[:, :, kept:] = 128
        scale = max(1, 64 // self.shape[-1])
        told = f"{seconds:.3g} seconds for each, {SHOWN} at a time, {self.device.type}."
        return [
            Picture("Samples", grid(as_pictures(samples), 8, scale=scale), told),
            Picture(
                "Completed halves",
                grid([*as_pictures(half), *as_pictures(drawn), *as_pictures(truth)], len(truth), scale=scale),
                "What is given; what is drawn below it; the held-out image.",
            ),
        ]


def sequence(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W C) int64."""
    return images.permute(0, 2, 3, 1).flatten(1).long()


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    """-ln p of every sub-pixel, (B, T) float64."""
    return F.cross_entropy(outputs.float()[..., :VALUES].mT, targets, reduction="none").double()


def _shifted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs, which begin with the start token, and targets."""
    return F.pad(values[:, :-1], (1, 0), value=START), values


@torch.inference_mode()
def draw_images(
    network: Decoder,
    shape: tuple[int, ...],
    count: int,
    device: torch.device,
    *,
    sampler: Sampler | None = None,
    seed: int = 0,
    given: Tensor | None = None,
) -> Tensor:
    """uint8 (count, C, H, W), drawn value by value with the network's state.

    Args:
        shape: C, H, W.
        given: (count, C, h, W): the first rows, as they are.
    """
    sampler, dice = sampler or Sampler(), torch.Generator().manual_seed(seed)
    rows_given = sequence(given) if given is not None else torch.empty(count, 0, dtype=torch.int64)
    token, state = torch.full((count,), START, device=device), network.init_state(count)
    values = []
    for t in range(math.prod(shape)):
        logits, state = network.step(token, state)
        known = t < rows_given.shape[1]
        value = rows_given[:, t] if known else sampler(logits[:, :VALUES], dice)
        values.append(value)
        token = value.to(device)
    channels, height, width = shape
    pixels = torch.stack(values, 1).view(count, height, width, channels).permute(0, 3, 1, 2)
    return pixels.to(torch.uint8)


def open_task(recipe: Recipe, device: torch.device) -> Pixels:
    """Reads the images into memory."""
    return Pixels(whole_images(recipe.data, recipe.img_size), recipe, device)


def build(recipe: Recipe, classes: list[str]) -> Decoder:
    """The network, with random weights."""
    return decoder(recipe, VALUES + 1, math.prod(_shape(classes)))


def _shape(classes: list[str]) -> tuple[int, ...]:
    return tuple(map(int, classes[0].partition(" ")[0].split("x")))


def predict(
    trained: Trained,
    source: Path,
    /,
    out: Path = Path("bits.csv"),
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Writes how many bits a dimension each image of SOURCE takes, as the network sees it.

    Args:
        source: an image, or a folder with all below it.
        out: a .csv file: path, bits, error (why an image could not be read).
        batch_size: images that the network takes at a time.
        device: auto, cpu or cuda.
    """
    trained = trained.on(device)

    def bits(images: Tensor) -> list[tuple[str]]:
        inputs, targets = _shifted(sequence(images).to(trained.device))
        found = nats(trained.model(inputs), targets).mean(1) / math.log(2)
        return [(f"{one:.6g}",) for one in found.tolist()]

    write_table(source, out, ("bits",), _shape(trained.classes), batch_size, bits)


def generate(
    trained: Trained,
    /,
    count: int = 16,
    complete: Path | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    out: Path = Path("samples.png"),
    device: str = "auto",
) -> None:
    """Draws images value by value, with a state that does not grow (softmax: a cache that does).

    Args:
        count: images.
        complete: a folder of images, or one, whose lower halves are drawn in place of whole images; the
            first `count` of them.
        temperature: of the probabilities; 0 takes the most probable value.
        top_k: draw among so many most probable values alone.
        top_p: draw among the most probable values that together have this probability alone.
        seed: of the draws.
        out: a .png file for all of them in rows of eight.
        device: auto, cpu or cuda.
    """
    at_least(1, count=count)
    at_least(0, seed=seed)
    if out.suffix != ".png":
        raise ValueError(f"out: expected a file that ends in .png, got {out}; rename it")
    sampler = Sampler(temperature, top_k, top_p)
    trained = trained.on(device)
    shape, given = _shape(trained.classes), None
    if complete is not None:
        read = [read_image(path, shape) for path in image_files(complete)[:count]]
        whole = [image for image in read if isinstance(image, Tensor)]
        if not whole:
            raise ValueError(f"complete: expected images that can be read, got none ({read[0]}); give others")
        given = torch.stack(whole)[:, :, : shape[1] // 2]
        count = len(whole)
    network: Any = trained.model
    before = time.perf_counter()
    drawn = draw_images(network, shape, count, trained.device, sampler=sampler, seed=seed, given=given)
    seconds = time.perf_counter() - before
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(as_pictures(drawn), min(8, count)).save(out)
    print(f"{out}: {count} images, {seconds / count:.3g} s each")

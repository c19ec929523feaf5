"""Bits per dimension of CIFAR-10 with every causal mechanism: one network, recipe, seed and budget; speed.

    python benchmarks/pixels.py --root FOLDER --out results/pixels-cpu.json

FOLDER holds train/<class>/*.png and test/<class>/*.png. What is finished is kept: the same command goes on.
"""

import math
import statistics
import time
from typing import Any

import torch
import tyro
from table import rows_of, write

from sansmax.tasks._data.settings import Data
from sansmax.tasks._recipes.pixels import Recipe
from sansmax.tasks.pixels import Pixels, build, open_task
from sansmax.train.loop import train
from sansmax.train.recipe import Optim

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "aft_simple": ("aft_simple", {}),
    "aft_local": ("aft_local", {"window": 256, "factor_dim": 64}),
    "aft_local, dense": ("aft_local", {"window": 256, "factor_dim": None}),
    "aft_full": ("aft_full", {"factor_dim": 64}),
    "aft_full, dense": ("aft_full", {"factor_dim": None}),
    "aft_conv": ("aft_conv", {"kernel_size": 128}),
    "sima": ("sima", {"token_scale": 256}),
    "xnorm": ("xnorm", {}),
    "softmax": ("softmax", {}),
}


def recipe(name: str, root: str, updates: int, seed: int) -> Recipe:
    mechanism, options = RUNS[name]
    return Recipe(
        mechanism=mechanism,
        model_args={"depth": 2, "embed_dim": 64, "num_heads": 4, "mechanism_args": options},
        img_size=32,
        dropout=0.0,
        epochs=1,
        batch_size=2,
        data=Data(root=root, val_split="test", num_samples=2 * updates),
        optim=Optim(lr=3e-3, lr_batch=None, weight_decay=0.1, clip=1.0, per="update", warmup=0.1),
        seed=seed,
        device="cpu",
    )


def bits(verdicts: torch.Tensor) -> dict[str, float]:
    """Mean over the images of their bits per dimension, and its standard error."""
    own = verdicts[:, 1] / math.log(2)
    return {"bits": own.mean().item(), "error": own.std().item() / len(own) ** 0.5}


def opened(made: Recipe, images: int) -> Pixels:
    """With so many held-out images, spread over the classes."""
    task = open_task(made, torch.device("cpu"))
    task.val_images = task.val_images[torch.linspace(0, task.val_size - 1, images).long()]
    task.val_size = images
    return task


def train_one(task: Pixels, made: Recipe) -> dict[str, Any]:
    """A run without a folder, and what its network says of the held-out images."""
    torch.manual_seed(made.seed)
    network = build(made, task.classes)
    outcome = train(network, task, made)
    return {
        **bits(outcome.verdicts),
        "by_image": (outcome.verdicts[:, 1] / math.log(2)).tolist(),
        "loss": outcome.curve[-1]["loss"],
        "train_seconds": outcome.train_seconds,
        "params": sum(p.numel() for p in network.parameters()),
        "state_bytes": 4 * sum(layer.state_size(3072) for layer in network.mixers()),
    }


def frequencies(task: Pixels) -> dict[str, Any]:
    """Every value by its frequency in its channel of the training images, to which one is added."""
    seen = task.train_images.transpose(0, 1).flatten(1).long()
    counts = torch.stack([channel.bincount(minlength=256) for channel in seen]).double() + 1
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    told = task.val_images.transpose(0, 1).long()  # (channels, images, height, width)
    own = torch.stack([n[channel] for n, channel in zip(nats, told, strict=True)]).mean((0, 2, 3))
    return bits(torch.stack([torch.arange(len(own)).double(), own], 1))


def speeds(made: dict[str, Recipe], classes: list[str], images: int) -> dict[str, dict[str, float]]:
    """Seconds of the 3,072 steps that draw so many images, divided by their number: all networks take their
    step before the next is taken. Also the milliseconds of a step at the beginning and at the end."""
    networks = {name: build(one, classes).eval() for name, one in made.items()}
    states = {name: network.init_state(images) for name, network in networks.items()}
    taken: dict[str, list[float]] = {name: [] for name in networks}
    chance = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(3072):
            token = torch.randint(256, (images,), generator=chance)
            for name, network in networks.items():
                started = time.perf_counter()
                _, states[name] = network.step(token, states[name])
                taken[name].append(time.perf_counter() - started)
    found = {}
    for name, steps in taken.items():
        # A block's median: what else runs on the machine adds to some steps only.
        blocks = [statistics.median(steps[i : i + 64]) for i in range(0, 3072, 64)]
        found[name] = {
            "seconds": 64 * sum(blocks) / images,
            "seconds_as_measured": sum(steps) / images,
            "first_ms": 1e3 * blocks[0],
            "last_ms": 1e3 * blocks[-1],
        }
    return found


def main(
    root: str,
    out: str = "pixels.json",
    names: tuple[str, ...] = (),
    updates: int = 150,
    images: int = 24,
    seed: int = 0,
    speed: bool = True,
) -> None:
    """Trains, scores the first test images and writes the table.

    Args:
        root: folder of the images.
        names: of RUNS (default: all).
        updates: of two images each.
        of the test folder that are scored, at equal distances in the order of classes and names.
        speed: times drawing when all rows are there.
    """
    made = {name: recipe(name, root, updates, seed) for name in names or RUNS}
    task = opened(next(iter(made.values())), images)
    rows = {name: lambda one=one: train_one(task, one) for name, one in made.items()}
    rows["frequencies"] = lambda: frequencies(task)
    found = rows_of(out, {"updates": updates, "images": images, "seed": seed}, rows)
    found["recipe"] = next(iter(made.values())).to_json()
    del found["recipe"]["out"], found["recipe"]["data"]["root"]
    if speed:
        timed = {name: one for name, one in made.items() if "dense" not in name}
        found["seconds_an_image"] = {count: speeds(timed, task.classes, count) for count in (1, 16)}
    write(out, found)


if __name__ == "__main__":
    tyro.cli(main)

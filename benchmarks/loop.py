"""The training loop beside a bare PyTorch loop: the same network, images, views, loss and optimiser.

    python benchmarks/loop.py --root FOLDER --out results/loop-cpu.json

FOLDER holds train/<class>/*.jpg. Whole epochs are timed, with data loading, logging and the state that is
saved after each; rounds of both loops alternate, so that what else the machine does meets both.
"""

import dataclasses
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sansmax.bench import measure
from sansmax.tasks._data import load_images
from sansmax.tasks._data.batches import Files, InMemory, training_view
from sansmax.tasks._data.settings import Augment, Data
from sansmax.tasks._data.split import open_split
from sansmax.tasks._data.views import views
from sansmax.tasks.classification import Classification
from sansmax.train.checkpoint import write_json
from sansmax.train.loop import train
from sansmax.train.network import build
from sansmax.train.recipe import Optim, Recipe

PHOTOS = Augment(scale=(0.35, 1.0), interpolation="bilinear")
DIGITS = Augment(scale=(1.0, 1.0), shift=1 / 16, hflip=0.0)


class Plain(Dataset[Any]):
    """What a bare loop reads."""

    def __init__(self, split: Any, transform: Any) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.split.picture(index)
        return torch.from_numpy(np.ascontiguousarray(self.transform(image))), label


def bare_files(split: Any, size: int, batch_size: int, workers: int) -> Any:
    """A function that gives the batches of an epoch from files."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    loader = DataLoader(
        Plain(split, training_view(PHOTOS, (size, size), (0.485, 0.456, 0.406))),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in loader:
            yield (pixels.float() / 255 - mean) / std, labels

    return epoch


def bare_memory(images: Any, batch_size: int) -> Any:
    """A function that gives the batches of an epoch from tensors."""
    mean, std = (t[:, None, None] for t in images.mean_std())

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images.train_labels))
        for index in order[: len(order) // batch_size * batch_size].split(batch_size):
            pixels = (images.train_images[index].float() / 255 - mean) / std
            yield views(pixels, DIGITS, torch.rand(5, batch_size), -mean / std), images.train_labels[index]

    return epoch


def bare(model: nn.Module, batches: Any, epochs: int) -> list[float]:
    """Seconds of each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    model.train()
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for inputs, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(model: nn.Module, task: Any, augment: Augment, batch_size: int, epochs: int) -> list[float]:
    """Seconds of each epoch but the first, with its lines and its state, without its evaluation."""
    ends: list[float] = []
    optim = Optim(lr=1e-3, lr_batch=None, clip=1.0, per="update", warmup=0)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, augment=augment, optim=optim, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        train(model, task, recipe, Path(folder), lambda *_: ends.append(time.perf_counter()))
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        evaluations = [line["eval_seconds"] for line in lines if line["kind"] == "eval"]
    return [b - a - e for (a, b), e in zip(itertools.pairwise(ends), evaluations[1:], strict=True)]


def main(root: str, out: str = "loop.json", rounds: int = 5, epochs: int = 3, workers: int = 1) -> None:
    """Times both loops on photos from files at 64 px and on digits in memory.

    Args:
        root: folder of photos.
        epochs: of a round; the first is left out.
    """
    random.seed(0)
    photos = open_split(Data(root=root), "train")
    few = open_split(Data(root=root), "validation").shuffled(2)
    once = load_images("digits")
    digits = dataclasses.replace(
        once, train_images=once.train_images.repeat(6, 1, 1, 1), train_labels=once.train_labels.repeat(6)
    )
    device = torch.device("cpu")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = Data(root=root)
    files = Files(photos, few, data, PHOTOS, (64, 64), 1.0, mean, std, workers, device)
    memory = InMemory(digits, DIGITS, device)
    memory._val, memory.val_size = (memory._val[0][:2], memory._val[1][:2]), 2

    def network(size: int, patch: int, channels: int) -> nn.Module:
        return build("vit_mini", "sima", img_size=size, num_classes=10, in_chans=channels, patch_size=patch)

    cases = {
        "photos from files, 64 px": (
            lambda: network(64, 8, 3),
            Classification(files, PHOTOS),
            PHOTOS,
            64,
            bare_files(photos, 64, 64, workers),
        ),
        "digits in memory, 8 px": (
            lambda: network(8, 2, 1),
            Classification(memory, DIGITS),
            DIGITS,
            48,
            bare_memory(digits, 48),
        ),
    }
    rows = {}
    for name, (make, task, augment, batch_size, batches) in cases.items():
        times: dict[str, list[float]] = {"bare": [], "sansmax": []}
        ratios = []
        for _ in range(rounds):
            first = bare(make(), batches, epochs)[1:]
            second = ours(make(), task, augment, batch_size, epochs)
            times["bare"] += first
            times["sansmax"] += second
            ratios.append(statistics.median(first) / statistics.median(second))
        images = task.train_size // batch_size * batch_size
        rows[name] = {
            **{f"{kind}_images_per_s": images / statistics.median(t) for kind, t in times.items()},
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        print(name, {k: v if isinstance(v, list) else round(v, 3) for k, v in rows[name].items()}, flush=True)
    about = {"commit": measure.commit(), "machine": measure.machine(), "versions": measure.versions()}
    write_json(Path(out), {"rows": rows, "workers": workers, "rounds": rounds, "epochs": epochs, **about})


if __name__ == "__main__":
    tyro.cli(main)

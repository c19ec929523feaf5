"""A generator of CIFAR-10 images with several mechanisms: one recipe, seed and budget; before and after.

    python benchmarks/generation.py --root FOLDER --out results/generation-cpu.json

FOLDER holds train/<class>/*.png and test/<class>/*.png. What is finished is kept: the same command goes on.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from sansmax import recipes
from sansmax.bench import measure
from sansmax.tasks.generation import build, open_task
from sansmax.train import parallel
from sansmax.train.checkpoint import read_json, write_json
from sansmax.train.loop import train
from sansmax.train.recipe import Data
from sansmax.train.verdicts import evaluate


def main(
    root: str,
    out: str = "generation.json",
    runs: str = "runs",
    names: tuple[str, ...] = ("external", "softmax", "sima", "xnorm", "aft_simple", "none"),
    epochs: int = 4,
    num_samples: int = 10_000,
    seed: int = 0,
) -> None:
    """Trains with each mechanism, writes the figures before and after, and a picture of the samples.

    Args:
        root: folder of the images.
        names: mechanisms; none: without attention.
        num_samples: training images, a fixed random subset.
    """
    found: dict[str, Any] = read_json(Path(out)) or {"rows": {}}
    for name in names:
        if name in found["rows"]:
            continue
        base = recipes.recipe(f"cifar10_gan_{'external' if name == 'none' else name}")
        recipe = dataclasses.replace(
            base,
            mechanism=None if name == "none" else name,
            epochs=epochs,
            seed=seed,
            device="cpu",
            data=Data(root=root, val_split="test", num_samples=num_samples),
            out=f"{runs}/{name}",
            resume=True,
        ).checked()
        made = parallel.accelerator(recipe)
        started = time.process_time()
        task = open_task(recipe, made.device)
        judge = time.process_time() - started
        torch.manual_seed(seed)
        model = build(recipe, task.classes)
        before = task.scores(evaluate(model, task, made))
        started = time.process_time()
        outcome = train(model, task, recipe, Path(recipe.out))
        seconds = time.process_time() - started
        verdicts = outcome.verdicts
        for picture in task.pictures(outcome.network, verdicts):
            picture.image.save(f"{recipe.out}/{picture.title.lower()}.png")
        found["rows"][name] = {
            "before": before,
            "after": task.scores(verdicts),
            "classifier_top1": task.details(verdicts)["classifier_top1"],
            "curve": outcome.curve,
            "params": sum(p.numel() for p in model.parameters()),
            "images_per_s": outcome.images_per_s,
            "train_seconds": outcome.train_seconds,
            "cpu_seconds": {"classifier": judge, "training_and_evaluation": seconds},
        }
        found |= {"recipe": recipe.to_json(), "commit": measure.commit(), "machine": measure.machine()}
        found["versions"] = measure.versions()
        del found["recipe"]["out"], found["recipe"]["data"]["root"], found["recipe"]["mechanism"]
        write_json(Path(out), found)
        print(name, json.dumps({k: found["rows"][name][k] for k in ("before", "after")}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)

"""CIFAR-10: a small ViT trained with softmax gets other mechanisms, beside the same network from scratch.

    python benchmarks/adapt.py --root FOLDER --out results/adapt-cpu.json

FOLDER holds train/<class>/*.png and test/<class>/*.png. What is finished is kept: the same command goes on.
From scratch a network has the seconds that its adaptation took, in whole epochs of its own speed.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from table import folder_of, rows_of

from sansmax import recipes
from sansmax.train.adapt import Adapt, adapt, recipe_of
from sansmax.train.checkpoint import read_json
from sansmax.train.network import load_network
from sansmax.train.recipe import Data, Recipe
from sansmax.train.run import run


def recipe(mechanism: str, root: str, out: str, epochs: int, num_samples: int) -> Recipe:
    """cifar10_<mechanism> with few images, no mixing and the narrow vit_mini."""
    base = recipes.recipe(f"cifar10_{mechanism}")
    own = base.model_args.get("mechanism_args")
    args = {"patch_size": 4, "stem": "conv", "class_token": False} | ({"mechanism_args": own} if own else {})
    return dataclasses.replace(
        base,
        model_args=args,
        precision="fp32",
        drop_path=0.0,
        epochs=epochs,
        batch_size=64,
        data=Data(root=root, val_split="test", memory=True, num_samples=num_samples),
        augment=dataclasses.replace(base.augment, reprob=0.0, mixup=0.0, cutmix=0.0),
        optim=dataclasses.replace(base.optim, lr_batch=None, warmup=1 if epochs > 1 else 0),
        out=out,
        resume=True,
    )


def row(mechanism: str, teacher: str, root: str, runs: str, whole: int, samples: int) -> dict[str, Any]:
    """The receipt in short, and the accuracy from scratch."""
    base = dataclasses.replace(
        recipe_of(load_network(teacher), teacher),
        epochs=whole,
        out=folder_of(runs, f"adapted {mechanism}"),
        resume=True,
    )
    receipt = adapt(teacher, mechanism, Adapt(mechanism_args=options(mechanism)), base)
    spent = receipt["seconds"]["layers"] + receipt["seconds"]["whole"]
    probe = run(recipe(mechanism, root, folder_of(runs, f"probe {mechanism}"), 1, samples))
    epochs = max(2, round(spent / probe.train_seconds))
    scratch = run(recipe(mechanism, root, folder_of(runs, f"scratch {mechanism}"), epochs, samples))
    kept = ("accuracy", "seconds", "layers", "speed")
    return {key: receipt[key] for key in kept} | {
        "scratch": {"top1": scratch.score, "epochs": epochs, "seconds": scratch.train_seconds}
    }


def options(mechanism: str) -> dict[str, Any]:
    return recipes.recipe(f"cifar10_{mechanism}").model_args.get("mechanism_args", {})


def main(
    root: str,
    out: str = "adapt.json",
    runs: str = "runs",
    names: tuple[str, ...] = ("sima", "xnorm", "aft_simple"),
    teacher_epochs: int = 20,
    whole_epochs: int = 5,
    num_samples: int = 20_000,
) -> None:
    """Trains the original, adapts it, trains from scratch, and writes the table after every mechanism.

    Args:
        root: folder of the images.
        names: mechanisms.
        teacher_epochs: of the original.
        whole_epochs: of every network's last part, in which the whole learns from the original.
        num_samples: training images, a fixed random subset.
    """
    teacher = str(Path(folder_of(runs, "teacher")).resolve())
    original = run(recipe("softmax", root, teacher, teacher_epochs, num_samples))
    settings = {"teacher_epochs": teacher_epochs, "whole_epochs": whole_epochs, "num_samples": num_samples}
    best = read_json(Path(teacher) / "recipe.json")["best"]
    rows = {name: partial(row, name, teacher, root, runs, whole_epochs, num_samples) for name in names}
    rows = {"teacher": lambda: {"top1": best, "seconds": original.train_seconds}} | rows
    rows_of(out, settings, rows)


if __name__ == "__main__":
    tyro.cli(main)

"""CIFAR-10 with every mechanism in one small network: one recipe, seed and budget; accuracy at other sizes.

    python benchmarks/cifar10.py --root FOLDER --out results/cifar10-cpu.json

FOLDER holds train/<class>/*.png and test/<class>/*.png. What is finished is kept: the same command goes on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from sansmax import _find, recipes
from sansmax.bench import measure
from sansmax.tasks._data.split import open_split
from sansmax.train.checkpoint import read_json, write_json
from sansmax.train.evaluate import evaluate
from sansmax.train.network import load_network
from sansmax.train.recipe import Data
from sansmax.train.run import run


def main(
    root: str,
    out: str = "cifar10.json",
    runs: str = "runs",
    names: tuple[str, ...] = (),
    epochs: int = 10,
    num_samples: int | None = 10_000,
    batch_size: int = 64,
    lr: float | None = None,
    sizes: tuple[int, ...] = (32, 48, 64),
    size_images: int = 2_000,
    options: str = "{}",
) -> None:
    """Trains, evaluates at several sizes and writes the table.

    Args:
        root: folder of the images.
        names: mechanisms, or mechanism:{"token_scale": 64} with options of the layer (default: all
            mechanisms).
        num_samples: training images, a fixed random subset.
        lr: learning rate (default: the recipe's, 3e-3 for SOFT and 1e-3 for all others).
        sizes: of the images after training at 32 px, enlarged by bicubic interpolation.
        size_images: held-out images at each size.
        options: further fields of the recipe's model_args, as JSON.
    """
    found: dict[str, Any] = read_json(Path(out)) or {"rows": {}}
    for name in names or ("softmax", *(n for n in _find.names("sansmax.layers") if n != "softmax")):
        if name in found["rows"]:
            continue
        mechanism, _, words = name.partition(":")
        base = recipes.recipe(f"cifar10_{mechanism}")
        model_args: dict[str, Any] = {
            "patch_size": 4,
            "stem": "conv",
            "class_token": False,
            **json.loads(options),
        }
        own = json.loads(words) if words else base.model_args.get("mechanism_args")
        if own:
            model_args["mechanism_args"] = own
        rate = base.optim.lr if lr is None else lr
        recipe = dataclasses.replace(
            base,
            model_args=model_args,
            precision="fp32",
            drop_path=0.0,
            epochs=epochs,
            batch_size=batch_size,
            data=Data(root=root, val_split="test", memory=True, num_samples=num_samples),
            augment=dataclasses.replace(base.augment, reprob=0.0, mixup=0.0, cutmix=0.0),
            optim=dataclasses.replace(base.optim, lr=rate, lr_batch=None, warmup=1),
            out=f"{runs}/{''.join(c if c.isalnum() else '_' for c in name)}",
            resume=True,
        )
        outcome = run(recipe)
        split = open_split(recipe.data, "test").shuffled(size_images)
        found["rows"][name] = {
            "mechanism_args": own,
            "lr": rate,
            "top1": outcome.score,
            "curve": outcome.curve,
            "train_seconds": outcome.train_seconds,
            "images_per_s": outcome.images_per_s,
            "sizes": {
                size: evaluate(load_network(recipe.out, img_size=size), split, crop=1.0)["top1"]
                for size in sizes
            },
        }
        found |= {"recipe": recipe.to_json(), "commit": measure.commit(), "machine": measure.machine()}
        found["versions"] = measure.versions()
        del found["recipe"]["out"], found["recipe"]["data"]["root"]
        write_json(Path(out), found)
        print(
            name,
            f"{100 * outcome.score:.1f}",
            found["rows"][name]["sizes"],
            f"{outcome.train_seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)

"""CamVid with every mechanism in one small network: one recipe, seed and budget; mIoU of the test images.

    python benchmarks/camvid.py --root FOLDER --out results/camvid-cpu.json

FOLDER holds train, trainannot, test and testannot, which are first reduced to 160 x 120. What is finished is
kept: the same command goes on. The weights are those of the last epoch, and nothing is chosen by the test
images, of which twelve are scored after every epoch and all at the end.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from table import SINGLE, folder_of, mechanism_of, norm_of, rows_of, write

from sansmax import _find, recipes
from sansmax.bench import measure
from sansmax.tasks._data.masks import IGNORED, open_scenes
from sansmax.tasks._recipes.segmentation import Recipe
from sansmax.tasks.segmentation import Segmentation, build, classes_of, open_task
from sansmax.train import parallel
from sansmax.train.run import run
from sansmax.train.trained import load_trained
from sansmax.train.verdicts import evaluate

SIZE = (160, 120)
NAMES = ("softmax", *(n for n in _find.names("sansmax.layers") if n != "softmax"), SINGLE)


def recipe(name: str, root: str, runs: str, epochs: int, seed: int) -> Recipe:
    """camvid_<mechanism> on images a third as large, so that one core has it in a minute."""
    base = recipes.recipe(f"camvid_{mechanism_of(name)}")
    assert isinstance(base, Recipe)
    return dataclasses.replace(
        base,
        crop_size=(72, 96),
        rescale=(0.6, 1.2),
        scales=(1.0,),
        epochs=epochs,
        batch_size=4,
        data=dataclasses.replace(base.data, root=root, val_split="test", val_samples=12, workers=0),
        out=folder_of(runs, name),
        seed=seed,
        device="cpu",
        resume=True,
    )


def reduced(root: str, to: Path) -> str:
    """Training and test images at SIZE, masks by their nearest pixels."""
    for split in ("train", "trainannot", "test", "testannot"):
        (to / split).mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(root) / split).iterdir()):
            way = Image.Resampling.NEAREST if split.endswith("annot") else Image.Resampling.BOX
            if not (made := to / split / f"{path.stem}.png").is_file():
                Image.open(path).resize(SIZE, way).save(made)
    return str(to)


def held_out(made: Recipe) -> Segmentation:
    data = dataclasses.replace(made.data, val_samples=None)
    return open_task(dataclasses.replace(made, data=data), torch.device("cpu"))


def train_one(name: str, made: Recipe) -> dict[str, Any]:
    """A run, and what its last weights find in the test images."""
    with norm_of(name):
        outcome = run(made)
        network = load_trained(f"{made.out}/weights.safetensors").model
        task = held_out(made)
        verdicts = evaluate(network, task, parallel.accelerator(made), 4)
    return {
        **task.scores(verdicts),
        "miou_error": jackknife(task, verdicts),
        **task.details(verdicts),
        "curve": outcome.curve,
        "train_seconds": outcome.train_seconds,
        "params": sum(p.numel() for p in network.parameters()),
    }


def jackknife(task: Segmentation, verdicts: torch.Tensor) -> float:
    """Standard error of the mIoU over the test images in 20 blocks of neighbours, which are frames of a
    video and so alike: sqrt((n - 1) / n sum_i (m_i - mean)^2), m_i without block i."""
    blocks = torch.arange(len(verdicts)).tensor_split(20)
    kept = torch.ones(len(blocks), len(verdicts), dtype=torch.bool)
    for i, block in enumerate(blocks):
        kept[i, block] = False
    left = torch.tensor([task.scores(verdicts[some])["miou"] for some in kept], dtype=torch.float64)
    return ((len(left) - 1) * left.var(correction=0)).sqrt().item()


def colour_and_place(made: Recipe) -> dict[str, Any]:
    """Logistic regression on red, green, blue, row and column of a pixel and their products of two: 200
    pixels of each training image; all of the test images."""
    task, chance = held_out(made), np.random.default_rng(0)
    train, count = open_scenes(made.data)[0], len(task.classes)

    def seen(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        place = np.stack(np.mgrid[:height, :width], -1) / (height, width)
        return np.concatenate([image / 255, place], -1).reshape(-1, 5)

    some, truth = [], []
    for position in range(len(train)):
        image, mask = train.read(position)
        where = chance.choice(np.flatnonzero(mask.ravel() != IGNORED), 200)
        some.append(seen(image)[where])
        truth.append(mask.ravel()[where])
    model = make_pipeline(PolynomialFeatures(2), StandardScaler(), LogisticRegression(max_iter=1500))
    model.fit(np.concatenate(some), np.concatenate(truth))
    rows = torch.zeros(task.val_size, 2 + 3 * count, dtype=torch.float64)
    for position in range(task.val_size):
        image, mask = task.pixels.val_scenes.read(position)
        mask = mask.ravel()
        kept = mask != IGNORED
        odds = model.predict_log_proba(seen(image)[kept])
        found, known = odds.argmax(1), mask[kept]
        rows[position, 0] = position
        rows[position, 1] = -odds[np.arange(len(known)), known].sum()
        counts = [np.bincount(x, minlength=count) for x in (known[found == known], known, found)]
        rows[position, 2:] = torch.from_numpy(np.concatenate(counts))
    return {**task.scores(rows), "miou_error": jackknife(task, rows), **task.details(rows)}


def speeds(made: dict[str, Recipe], classes: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of an image of 160 x 120 as evaluation looks at it, in turn."""
    image = torch.randint(256, (1, 3, SIZE[1], SIZE[0]), generator=torch.Generator().manual_seed(0)).byte()
    networks = {name: build(one, classes).eval() for name, one in made.items()}

    @torch.inference_mode()
    def look_at(name: str) -> None:
        classes_of(networks[name], image, made[name])

    taken = measure.interleaved({n: lambda n=n: look_at(n) for n in networks}, seconds=seconds)
    return {name: measure.spread(samples, 1e3) for name, samples in taken.items()}


def main(
    root: str,
    out: str = "camvid.json",
    runs: str = "runs",
    names: tuple[str, ...] = (),
    epochs: int = 2,
    seed: int = 0,
    seconds: float = 60.0,
) -> None:
    """Trains, evaluates and writes the table.

    Args:
        root: folder of the images and masks.
        names: mechanisms (default: all, and external attention with a single norm).
        seconds: for milliseconds an image, measured when all rows are there; 0: not yet.
    """
    root = reduced(root, Path(runs) / f"{SIZE[0]}x{SIZE[1]}")
    made = {name: recipe(name, root, runs, epochs, seed) for name in names or NAMES}
    rows = {name: lambda name=name, one=one: train_one(name, one) for name, one in made.items()}
    any_of_them = next(iter(made.values()))
    rows["colour and place"] = lambda: colour_and_place(any_of_them)
    found = rows_of(out, {"epochs": epochs, "seed": seed}, rows)
    found["recipe"] = dataclasses.replace(any_of_them, out="").to_json()
    del found["recipe"]["data"]["root"]
    if seconds:
        timed = {name: one for name, one in made.items() if name != SINGLE}
        found["ms"] = speeds(timed, list(any_of_them.data.classes), seconds)
    write(out, found)


if __name__ == "__main__":
    tyro.cli(main)

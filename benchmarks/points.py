"""Point clouds with every mechanism in one small network: one recipe, seed and budget for each set.

    python benchmarks/points.py modelnet10 --root FOLDER --out results/points-modelnet10-cpu.json

FOLDER holds modelnet10_vox24.npz, psb_classes.npz and psb_parts.npz, laid out as docs/points.md says. What is
finished is kept: the same command goes on. The weights are those of the last epoch, and nothing is chosen by
the test clouds, of which 48 are scored after every epoch and all at the end.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from table import SINGLE, folder_of, mechanism_of, norm_of, rows_of, write
from torch import Tensor

from sansmax import recipes
from sansmax.bench import measure
from sansmax.recipes.points import LAYERS, ORDERLESS
from sansmax.tasks._data.points import Share
from sansmax.tasks._recipes.points import PointAugment, Recipe
from sansmax.tasks.points import Parts, Points, build, open_task, shape_iou
from sansmax.train.run import run
from sansmax.train.trained import load_trained

# File, prefix of the recipes, epochs: one core learns a set in about half a minute.
SETS = {
    "modelnet10": ("modelnet10_vox24.npz", "points_", 1),
    "psb_classes": ("psb_classes.npz", "points_", 8),
    "psb_parts": ("psb_parts.npz", "points_parts_", 15),
}
COUNTS = (64, 128, 256, 512, 1024)


def recipe(kind: str, name: str, root: str, runs: str, epochs: int, seed: int) -> Recipe:
    """points_<mechanism> with half the neighbours; no rotations: the clouds of a class stand alike."""
    file, prefix, own = SETS[kind]
    base = recipes.recipe(prefix + mechanism_of(name))
    assert isinstance(base, Recipe)
    words = base.model_args if kind == "psb_parts" else base.model_args | {"num_neighbors": 8}
    return dataclasses.replace(
        base,
        model_args=words,
        epochs=epochs or own,
        data=dataclasses.replace(base.data, root=f"{root}/{file}", val_clouds=48),
        augment=PointAugment(dropout=0.0, rotation="none", scale=(0.8, 1.25), translate=0.1, jitter=0.01),
        out=folder_of(runs, f"{kind} {name}"),
        seed=seed,
        device="cpu",
        resume=True,
    )


def held_out(made: Recipe) -> Points:
    data = dataclasses.replace(made.data, val_clouds=None)
    return open_task(dataclasses.replace(made, data=data), torch.device("cpu"))


def figures(task: Points, verdicts: Tensor) -> dict[str, float]:
    """Scores, and the standard error of the first over the clouds."""
    own = verdicts[:, 2] if isinstance(task, Parts) else (verdicts[:, 1] == verdicts[:, 2]).double()
    return task.scores(verdicts) | {"error": own.std().item() / len(own) ** 0.5}


@torch.inference_mode()
def verdicts(task: Points, network: torch.nn.Module, points: int) -> Tensor:
    """Of all test clouds with as many points as were learned, of 256 at equal distances with others."""
    most = task.val_size if points == task.recipe.points else 256
    chosen = torch.linspace(0, task.val_size - 1, min(most, task.val_size)).long()
    batches = (task.seen(index, points=points) for index in chosen.split(32))
    return torch.cat([task.verdict(network(batch.inputs), batch) for batch in batches])


def train_one(name: str, made: Recipe, task: Points) -> dict[str, Any]:
    """A run, and what its last weights make of the test clouds with fewer and more points."""
    with norm_of(name):
        outcome = run(made)
        network = load_trained(f"{made.out}/weights.safetensors").model
        found = {count: figures(task, verdicts(task, network, count)) for count in COUNTS}
    return {
        **found[made.points],
        "points": {count: row[task.score] for count, row in found.items()},
        "curve": outcome.curve,
        "train_seconds": outcome.train_seconds,
        "params": sum(p.numel() for p in network.parameters()),
    }


def statistics(task: Points, share: Share, order: Tensor) -> np.ndarray:
    """Of as many points as the network sees: 17 quantiles of the distances from the centre, the eigenvalues
    of the covariance, 9 quantiles of every coordinate."""
    found = []
    for start, stop in zip(share.starts[:-1].tolist(), share.starts[1:].tolist(), strict=True):
        xyz = share.xyz[start:stop][order[: task.recipe.points]].double().numpy()
        far = np.quantile(np.linalg.norm(xyz, axis=1), np.linspace(0, 1, 17))
        places = np.quantile(xyz, np.linspace(0, 1, 9), axis=0).ravel()
        found.append(np.r_[far, np.linalg.eigvalsh(np.cov(xyz.T)), places])
    return np.array(found)


def simple_classes(task: Points) -> dict[str, Any]:
    """Logistic regression on `statistics`."""
    train, val = task.clouds.train, task.clouds.val
    order = torch.randperm(int(val.counts.min()), generator=torch.Generator().manual_seed(0))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(statistics(task, train, order), train.labels)
    odds = torch.from_numpy(model.predict_log_proba(statistics(task, val, order)))
    rows = torch.arange(len(val))
    nats = -odds[rows, val.labels]
    return figures(task, torch.stack([rows, val.labels, odds.argmax(1), nats], 1))


def simple_parts(task: Points, neighbours: int) -> dict[str, Any]:
    """The part that most of the nearest training points have, in the class's own training clouds; without
    neighbours, the class's most frequent part."""
    assert isinstance(task, Parts)
    shares = task.clouds.train, task.clouds.val
    (xyz, parts), (seen, truth) = (
        (s.xyz.unflatten(0, (len(s), -1)), s.parts.view(len(s), -1)) for s in shares
    )
    order = torch.randperm(truth.shape[1], generator=torch.Generator().manual_seed(0))[: task.recipe.points]
    rows = []
    for position, label in enumerate(shares[1].labels.tolist()):
        mine = shares[0].labels == label
        known = parts[mine].flatten()
        guess = known.mode().values.expand(len(order))
        if neighbours:
            model = KNeighborsClassifier(neighbours).fit(xyz[mine].flatten(0, 1), known)
            guess = torch.from_numpy(model.predict(seen[position, order]))
        real = truth[position, order]
        iou = shape_iou(guess[None], real[None], task.own[label][None]).item()
        rows.append([position, label, iou, (guess == real).double().mean().item(), float("nan")])
    found = figures(task, torch.tensor(rows, dtype=torch.float64))
    return {name: value for name, value in found.items() if value == value}


def speeds(task: Points, made: dict[str, Recipe], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a cloud, 16 at a time, in turn."""
    inputs = task.seen(torch.arange(16)).inputs
    networks = {name: build(one, task.classes).eval() for name, one in made.items()}

    @torch.inference_mode()
    def look_at(name: str) -> None:
        networks[name](inputs)

    taken = measure.interleaved({n: lambda n=n: look_at(n) for n in networks}, seconds=seconds)
    return {name: measure.spread(samples, 1e3 / 16) for name, samples in taken.items()}


def main(
    kind: Literal["modelnet10", "psb_classes", "psb_parts"],
    /,
    root: str,
    out: str = "points.json",
    runs: str = "runs",
    names: tuple[str, ...] = (),
    epochs: int = 0,
    seed: int = 0,
    seconds: float = 20.0,
) -> None:
    """Trains, evaluates and writes the table of a set.

    Args:
        root: folder of the three files.
        names: mechanisms (default: all that the network takes, "softmax" being PCT's own attention, and
            external attention with a single norm).
        epochs: 0: 1, 8 and 15 for the three sets.
        seconds: for milliseconds a cloud, measured when all rows are there; 0: not yet.
    """
    known = ORDERLESS if kind == "psb_parts" else LAYERS
    all_names = ("softmax", *(name for name in known if name != "softmax"), SINGLE)
    made = {name: recipe(kind, name, root, runs, epochs, seed) for name in names or all_names}
    any_of_them = next(iter(made.values()))
    task = held_out(any_of_them)
    rows = {name: lambda name=name, one=one: train_one(name, one, task) for name, one in made.items()}
    if kind == "psb_parts":
        rows["most frequent part"] = lambda: simple_parts(task, 0)
        rows["nearest 5 points"] = lambda: simple_parts(task, 5)
    else:
        rows["statistics"] = lambda: simple_classes(task)
    found = rows_of(out, {"set": kind, "epochs": any_of_them.epochs, "seed": seed}, rows)
    found["recipe"] = dataclasses.replace(any_of_them, out="").to_json()
    found["recipe"]["data"]["root"] = SETS[kind][0]
    if seconds:
        timed = {name: one for name, one in made.items() if name != SINGLE}
        found["ms"] = speeds(task, timed, seconds)
    write(out, found)


if __name__ == "__main__":
    tyro.cli(main)

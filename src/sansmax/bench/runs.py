"""What a run folder holds, read whole or as far as the run has come."""

import json
import math
import statistics
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._evaluation import Evaluation

__all__ = ["RunRecord", "differences", "find_runs", "flat", "read_run"]

KEYS = (
    *("sansmax", "commit", "command", "recipe", "classes", "data"),
    *("network", "machine", "versions", "started"),
)
# Where a run is kept and how it is watched; none changes what the network learns.
NOT_COMPARED = ("out", "resume", "save_every", "keep", "log_every", "tensorboard", "wandb")
# Of runs from before there were other tasks.
FIGURES = {"top1": "top-1, %", "top5": "top-5, %", "loss": "loss"}
CIRCUMSTANCES = ("sansmax", "data", "network", "machine", "versions")


@dataclass(frozen=True)
class RunRecord:
    """A run folder: recipe.json (`info`) and the lines of metrics.jsonl (`train`, `evals`), finite only;
    `evaluation` is None, `gallery`, `pictures` and `skipped` are empty where the run has not come so far, or
    its task has none.
    """

    folder: Path
    info: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    evaluation: Evaluation | None
    gallery: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]]
    pictures: Sequence[Mapping[str, Any]] = ()

    @property
    def task(self) -> str:
        return self.info.get("task", "classification")

    @property
    def figures(self) -> Mapping[str, str]:
        """What the lines of `evals` hold, and its name for people; the first tells the best weights. A name
        that ends in ", %" is a share's."""
        return self.info.get("figures", FIGURES)

    @property
    def unit(self) -> str:
        """Of samples, in the plural."""
        return self.info.get("unit", "images")

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def epochs(self) -> int:
        """Of the recipe."""
        return self.info["recipe"]["epochs"]

    @property
    def epochs_done(self) -> float:
        return max((line["epoch"] for line in (*self.train, *self.evals)), default=0)

    @property
    def finished(self) -> bool:
        return self.epochs_done >= self.epochs

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The line of the evaluation with the best first figure, the first of equals."""
        score = next(iter(self.figures))
        choose = max if self.info.get("higher", True) else min
        return choose((line for line in self.evals if score in line), key=lambda e: e[score], default=None)

    @property
    def last(self) -> Mapping[str, Any] | None:
        return self.evals[-1] if self.evals else None

    @property
    def seconds(self) -> float | None:
        """Training time so far."""
        return max(
            (line["seconds"] for line in (*self.train, *self.evals) if "seconds" in line), default=None
        )

    @cached_property
    def per_s(self) -> float | None:
        """Samples a second, median over the lines."""
        key = f"{self.unit}_per_s"
        found = [line[key] for line in self.train if key in line]
        return statistics.median(found) if found else None

    @property
    def data_wait(self) -> float | None:
        """Mean over the lines, a share."""
        found = [line["data_wait"] for line in self.train if "data_wait" in line]
        return statistics.fmean(found) if found else None

    @property
    def skipped_steps(self) -> int:
        return max((line.get("skipped_steps", 0) for line in self.train), default=0)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and directly in them, each once.

    Raises:
        ValueError: a path is neither a run folder nor holds one.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        runs = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir())) if path.is_dir() else []
        if not runs:
            what = "a folder without one" if path.is_dir() else "a file" if path.exists() else "nothing"
            raise ValueError(
                f"run: expected a folder of `sansmax train`, which holds recipe.json, or a folder of such "
                f"folders, got {what} at {path}; name the folder that was given to --out"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(path: Path) -> bool:
    return (path / "recipe.json").is_file()


def read_run(folder: Path) -> RunRecord:
    """The run folder, also of a run that goes on or was killed.

    Lines of metrics.jsonl that are not whole are left out; where a resumed run wrote an update again, the
    later line counts.

    Raises:
        ValueError: it is no run folder, or a file in it is not what `sansmax train` writes.
    """
    (folder,) = find_runs([folder]) if not _is_run(folder) else [folder]
    info = _json(folder / "recipe.json", dict)
    for key in KEYS:
        if key not in info:
            raise ValueError(
                f"{folder / 'recipe.json'}: expected what `sansmax train` writes, got no {key!r}; "
                f"name another run"
            )
    train, evals = _metrics(folder / "metrics.jsonl")
    return RunRecord(
        folder,
        info,
        train,
        evals,
        _evaluation(folder / "evaluation.npz", info["classes"]),
        _json(folder / "gallery.json", list),
        _json(folder / "skipped.json", list),
        _json(folder / "pictures.json", list),
    )


def _json(path: Path, kind: type) -> Any:
    """The content, empty where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {str(error)!r}; restore or remove it") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}; restore it")
    return content


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for words in text.splitlines():
        try:
            line = json.loads(words)
        except ValueError:
            continue
        before = lines.get(str(line.get("kind"))) if isinstance(line, dict) else None
        if before is None:
            continue
        line = {k: v for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
        if not {"update", "epoch"} <= line.keys():
            continue
        while before and before[-1]["update"] >= line["update"]:
            before.pop()
        before.append(line)
    return lines["train"], lines["eval"]


def _evaluation(path: Path, classes: Sequence[str]) -> Evaluation | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("labels", "top", "probabilities", "truth")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected labels, top, probabilities and truth, got a file that cannot be read "
            f"({str(error).strip(chr(39))}); remove it for a report without it"
        ) from None
    return Evaluation(**arrays, classes=classes) if arrays["labels"].size else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}, "model_args": {}} as {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


class Difference(NamedTuple):
    field: str
    values: tuple[Any, ...]


def differences(runs: Sequence[RunRecord]) -> tuple[list[Difference], list[Difference]]:
    """The fields whose values are not equal in all runs: of the recipes, and of data, network and machine.

    Fields that say where a run is kept and how it is watched are left out.
    """
    recipes = [{k: v for k, v in flat(r.info["recipe"]).items() if k not in NOT_COMPARED} for r in runs]
    others = [flat({k: r.info[k] for k in CIRCUMSTANCES if k in r.info}) for r in runs]
    return _differing(recipes), _differing(others)


def _differing(sides: Sequence[Mapping[str, Any]]) -> list[Difference]:
    fields = dict.fromkeys(field for side in sides for field in side)
    rows = [Difference(field, tuple(side.get(field) for side in sides)) for field in fields]
    return [row for row in rows if any(value != row.values[0] for value in row.values[1:])]

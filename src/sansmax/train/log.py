"""What a run tells while it goes on: metrics.jsonl, TensorBoard, Weights & Biases, a line on the terminal."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint import refused, write_text
from .recipe import Run
from .state import Position

__all__ = ["Log"]


class Log:
    """Lines of a run; every process may call it, those without a folder stay silent.

    Args:
        folder: of the run, or None.
        total: updates of the whole run.
        at: where the run goes on: lines behind it are dropped, because they will be written anew.
    """

    def __init__(self, recipe: Run, folder: Path | None, console: Console, total: int, at: Position) -> None:
        self._path = folder / "metrics.jsonl" if folder else None
        self._trackers: list[Any] = []
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = [line for line in _lines(self._path) if _stays(line, at.update, at.evaluated)]
            write_text(self._path, "".join(map(_text, lines)))
        if folder and recipe.tensorboard:
            self._trackers.append(_TensorBoard(folder, at.update))
        if folder and recipe.wandb:
            self._trackers.append(_Wandb(recipe, folder))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left{task.fields[words]}"),
            console=console,
            transient=True,
            speed_estimate_period=120,
            disable=console.quiet or not (console.is_terminal or console.is_jupyter),
        )
        self._bar = self._progress.add_task("training", total=total, completed=at.update, words="")

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()

    def advance(self, update: int) -> None:
        """The bar."""
        self._progress.update(self._bar, completed=update)

    def line(self, kind: str, **values: Any) -> None:
        """One line of metrics.jsonl, written when this returns; numbers that are not finite become null.

        Raises:
            OSError: the disk is full.
        """
        values = {name: value if _finite(value) else None for name, value in values.items()}
        if kind == "train":
            loss = "not finite" if values["loss"] is None else f"{values['loss']:.3f}"
            unit = next(name.removesuffix("_per_s") for name in values if name.endswith("_per_s"))
            rate = f"{values[f'{unit}_per_s']:,.0f} {unit}/s, {values['data_wait']:.0%} waiting for data"
            self._progress.update(self._bar, words=f", loss {loss}, {rate}")
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_text({"kind": kind, **values}))
        except OSError as error:
            raise refused(self._path, error) from None
        told = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(told, values["update"])


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _stays(line: dict[str, Any], update: int, evaluated: int) -> bool:
    return line["epoch"] <= evaluated if line["kind"] == "eval" else line["update"] <= update


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, if there is one."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:  # half written when the run was killed
            continue
    return found


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


class _TensorBoard:
    def __init__(self, folder: Path, update: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard: expected the package tensorboard, got none; pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def log(self, values: dict[str, float], update: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, recipe: Run, folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "wandb: expected the package wandb, got none; pip install sansmax[wandb]"
            ) from None
        identity = folder / "wandb-id"  # not the folder's name, which another run may have had
        if not identity.is_file():
            write_text(identity, secrets.token_hex(8))
        self._run = wandb.init(
            project=recipe.wandb,
            name=folder.resolve().name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=recipe.to_json(),
        )

    def log(self, values: dict[str, float], update: int) -> None:
        self._run.log(values, step=update)

    def close(self) -> None:
        self._run.finish()

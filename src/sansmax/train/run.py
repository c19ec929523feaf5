"""A run: its folder, its task, the loop, and what is kept."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from . import artifacts, parallel
from .checkpoint import prepare_folder, read_json, write_json
from .images import image_job
from .job import Job, task_job
from .loop import Outcome, curve_name, train
from .recipe import Recipe, Run, read_recipe

__all__ = ["run"]

# What may differ between the command that began a run and the one that goes on with it.
FREE = {
    "out",
    "resume",
    "save_every",
    "keep",
    "log_every",
    "bad_steps",
    "tensorboard",
    "wandb",
    "device",
    "parallel",
    "compile",
    "channels_last",
    "checkpointing",
    "accumulate",
    "data.workers",
    "data.root",
    "data.download",
}


def run(recipe: Run, console: Console | None = None, command: str | None = None) -> Outcome:
    """Trains as the recipe says; `recipe.out` then holds

    recipe.json (also classes, versions, machine), metrics.jsonl, weights.safetensors, best.safetensors
    (by the task's score: of a classification the highest top-1), skipped.json, states/, report.html,
    pictures.json, and of a classification evaluation.npz and gallery.json (the last evaluation).

    Args:
        console: where progress is shown; None is silent.
        command: that was given; None: the shortest that gives this recipe.

    Raises:
        ValueError, OSError: a setting, the data or the folder will not do; one sentence says what to do.
        sansmax.train.guard.Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    recipe = recipe.checked()
    made = parallel.accelerator(recipe)
    console = console if console and made.is_main_process else Console(quiet=True)
    folder = Path(recipe.out).expanduser()
    if made.is_main_process:
        prepare_folder(folder)
    made.wait_for_everyone()
    if recipe.optim.warmup >= recipe.epochs:
        console.print(
            f"optim.warmup: the rate still rises when the run of {recipe.epochs} epochs ends, because it "
            f"warms up for {recipe.optim.warmup:g}",
            highlight=False,
            soft_wrap=True,
        )
    before = _begun(folder, recipe)
    made.wait_for_everyone()  # all have looked before one writes
    job = (
        image_job(recipe, made, folder, console)
        if isinstance(recipe, Recipe)
        else task_job(recipe, made, folder)
    )
    task = job.task
    _check_data(job, before, folder)
    about = before or artifacts.about(recipe, job, command)
    if made.is_main_process and not before:
        write_json(folder / "recipe.json", about)
    sign = 1 if task.higher else -1
    best, unreadable = [sign * about.get("best", -sign * math.inf)], list(task.skipped)

    def keep(point: dict[str, float], evaluated: nn.Module, verdicts: Tensor) -> None:
        """After every epoch: the best weights, what could not be read."""
        score = point[curve_name(task.score)]
        best_so_far = sign * score > best[0]
        last = point["epoch"] == recipe.epochs
        best[0] = max(best[0], sign * score)
        tensors = parallel.weights(evaluated) if best_so_far or last else {}
        unreadable[:] = parallel.gathered(made, task.skipped)
        if not made.is_main_process:
            return
        metadata = job.metadata(about, point)
        for name in ["best"] * best_so_far + ["weights"] * last:
            artifacts.save_weights(folder / f"{name}.safetensors", tensors, metadata)
        if best_so_far:
            write_json(folder / "recipe.json", {**about, "best": score})
        job.keep(verdicts)
        if unreadable:
            write_json(folder / "skipped.json", unreadable)

    outcome = train(job.model, task, recipe, folder, keep, console)
    job.finish(outcome)
    if made.is_main_process:
        artifacts.report(folder, console)
        if unreadable:
            first = "{path}: {reason}".format(**unreadable[0])
            console.print(
                f"skipped {len(unreadable)} unreadable {task.unit}, listed in {folder / 'skipped.json'}, "
                f"the first {first}",
                highlight=False,
            )
    return outcome


def _begun(folder: Path, recipe: Run) -> dict[str, Any] | None:
    """What an earlier command wrote of this run.

    Raises:
        ValueError: there is a run and no --resume, or it is another one.
    """
    before = read_json(folder / "recipe.json")
    if before is None:
        return None
    if not recipe.resume:
        raise ValueError(
            f"out: expected a new folder, got {folder} with a run in it; add --resume to go on with it, or "
            "name another folder with --out"
        )
    if not isinstance(before, dict) or not {"recipe", "classes", "data", "network"} <= before.keys():
        raise ValueError(
            f"out: expected what `sansmax train` writes in {folder / 'recipe.json'}, got something else; "
            "name another folder with --out"
        )
    if (task := before.get("task", Recipe.task)) != recipe.task:
        raise ValueError(
            f"recipe: expected one of {task}, of which {folder} holds a run, got {recipe.task}; name another "
            "folder with --out"
        )
    old, new = _flat(read_recipe(before).to_json()), _flat(recipe.to_json())
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            raise ValueError(
                f"{name}: expected {old.get(name)!r}, with which {folder} was begun, got "
                f"{new.get(name)!r}; use the same, or name another folder with --out"
            )
    return before


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "model_args":
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_data(job: Job, before: dict[str, Any] | None, folder: Path) -> None:
    task = job.task
    if before and before["classes"] != task.classes:
        raise ValueError(
            f"data: expected the {len(before['classes'])} classes with which {folder} was begun, got "
            f"{len(task.classes)} others; check data.root and data.split"
        )
    if before and before["data"]["train"] != task.train_size:
        raise ValueError(
            f"data: expected the {before['data']['train']} training {task.unit} with which {folder} was "
            f"begun, got {task.train_size}; check data.root and data.split"
        )

"""A network of a run of any task but classification, read again, and evaluated."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from .. import _find, tasks
from ..models._published import fill
from ..tasks._task import Task, Trained
from . import parallel
from .network import WEIGHTS
from .recipe import Run, read_recipe
from .verdicts import evaluate

__all__ = ["evaluate_run", "load_trained", "module_of"]


def module_of(what: str) -> Any:
    """The file of sansmax.tasks of which `what`, a run folder or a file of its weights, is; None for anything
    else, and for classification, which has networks from elsewhere too."""
    task = _metadata(what).get("task")
    return _find.load(tasks.__name__, task) if task else None


def load_trained(what: str) -> Trained:
    """The network of a run folder (its best weights) or of a file of weights that a run wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    metadata = _metadata(what)
    recipe = read_recipe({"task": metadata["task"], "recipe": json.loads(metadata["recipe"])})
    classes = json.loads(metadata["classes"])
    model = module_of(what).build(recipe, classes)
    file = _file(what)
    fill(model, safetensors.torch.load_file(file), str(file))
    return Trained(model.eval(), recipe, classes, torch.device("cpu"))


def evaluate_run(trained: Trained, recipe: Run) -> tuple[Task, dict[str, float], dict[str, Any]]:
    """The task, with the held-out samples that `recipe` names, and its figures and details on them.

    Raises:
        ValueError: the samples have other classes than the network has learned.
    """
    made = parallel.accelerator(recipe)
    task: Task = _find.load(tasks.__name__, recipe.task).open_task(recipe, made.device)
    if task.classes != trained.classes:
        raise ValueError(
            f"data: expected the {len(trained.classes)} classes that the network has learned, got "
            f"{len(task.classes)} others; give the data that it was trained for"
        )
    network = trained.model.to(made.device)
    verdicts = evaluate(network, task, made, recipe.batch_size)
    return task, task.scores(verdicts), task.details(verdicts)


def _file(what: str) -> Path:
    path = Path(what).expanduser()
    return next((path / name for name in WEIGHTS if (path / name).is_file()), path)


def _metadata(what: str) -> dict[str, str]:
    file = _file(what)
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    try:
        with safetensors.safe_open(file, "pt") as content:
            return content.metadata() or {}
    except Exception as error:
        raise ValueError(
            f"network: expected a .safetensors file that can be read at {file}, got "
            f"{' '.join(str(error).split())}; train again, or fetch it again if it is cut off"
        ) from None

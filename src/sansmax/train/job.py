"""What a run does besides its loop, by task."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import _find, tasks
from ..tasks._task import Task
from .checkpoint import States, write_json
from .loop import Outcome
from .recipe import Run

__all__ = ["Job", "png", "task_job"]


@dataclass(frozen=True)
class Job:
    """A task, its network, and how a run keeps them.

    Attributes:
        about: what recipe.json tells of the network beyond its name and size.
        example: an input of it; None: its operations are not counted.
        metadata: of a weights file, from recipe.json and the newest point of the curve.
        keep: of the verdicts of an evaluation, by the main process.
        finish: at the end, by all processes.
    """

    task: Task
    model: nn.Module
    about: dict[str, Any]
    example: Any
    metadata: Callable[[dict[str, Any], dict[str, float]], dict[str, str]]
    keep: Callable[[Tensor], Any]
    finish: Callable[[Outcome], Any]


def task_job(recipe: Run, made: Accelerator, folder: Path) -> Job:
    """Of a file of sansmax.tasks."""
    module = _find.load(tasks.__name__, recipe.task)
    task: Task = module.open_task(recipe, made.device)
    torch.manual_seed(recipe.seed)
    model = module.build(recipe, task.classes)
    if recipe.weights and not (recipe.resume and States(folder / "states").paths()):
        if not hasattr(module, "load_weights"):
            raise ValueError(f"weights: expected none with {recipe.task}, got {recipe.weights}; leave it out")
        module.load_weights(model, recipe)

    def metadata(about: dict[str, Any], point: dict[str, float]) -> dict[str, str]:
        told = {"task": recipe.task, "recipe": about["recipe"], "classes": task.classes, **point}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}

    @torch.inference_mode()
    def finish(outcome: Outcome) -> None:
        pictures = task.pictures(outcome.network.eval(), outcome.verdicts)
        if made.is_main_process:
            told = [
                {"title": p.title, "caption": p.caption, "png": base64.b64encode(png(p.image)).decode()}
                for p in pictures
            ]
            write_json(folder / "pictures.json", told)

    return Job(task, model, task.about(), task.example(), metadata, lambda _: None, finish)


def png(image: Any) -> bytes:
    """The file's content."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()

"""The files of a run's folder, besides metrics and states."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from torch import Tensor

from .. import __version__
from ..bench import measure
from ..bench.run_report import render_run
from ..bench.runs import RunRecord, read_run
from .checkpoint import replace_file, write_text
from .job import Job
from .recipe import Run, read_recipe

__all__ = ["about", "page", "report", "save_weights"]


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, written whole or not at all."""
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain, metadata)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def about(recipe: Run, job: Job, command: str | None) -> dict[str, Any]:
    """recipe.json: the recipe, the network, the data, the machine."""
    task = job.task
    return {
        "sansmax": __version__,
        "commit": measure.commit(),
        "command": command or recipe.command(),
        "task": recipe.task,
        "figures": dict(task.figures),
        "higher": task.higher,
        "unit": task.unit,
        "recipe": recipe.to_json(),
        "classes": task.classes,
        "data": {"name": task.title, "train": task.train_size, "val": task.val_size, "split": task.split},
        "network": {
            "name": recipe.model,
            "params": sum(p.numel() for p in job.model.parameters()),
            "flops": None if job.example is None else measure.count_flops(job.model, job.example),
            **job.about,
        },
        "machine": measure.machine(),
        "versions": measure.versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def page(run: RunRecord) -> str:
    """The report; fields of the recipe that differ from its task's defaults are marked."""
    return render_run(run, read_recipe({**run.info, "recipe": {}}).to_json())


def report(folder: Path, console: Console) -> None:
    """report.html."""
    write_text(folder / "report.html", page(read_run(folder)))
    console.print(f"{folder / 'report.html'} shows the run", highlight=False, markup=False, soft_wrap=True)

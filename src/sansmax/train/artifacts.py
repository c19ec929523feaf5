"""The files of a run's folder, besides metrics and states."""

import base64
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

from .. import __version__
from ..bench import measure
from ..bench.run_report import render_run
from ..bench.runs import read_run
from ..tasks._data.batches import Source
from .checkpoint import replace_file, write_text
from .recipe import Recipe

__all__ = ["about", "gallery", "metadata", "report", "save_verdicts", "save_weights"]

PICTURES = 12  # of either kind in the report


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, written whole or not at all."""
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain, metadata)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def about(recipe: Recipe, source: Source, model: nn.Module, size: int, command: str | None) -> dict[str, Any]:
    """recipe.json: the recipe, the network, the data, the machine."""
    shape = (1, len(source.mean), size, size)
    return {
        "sansmax": __version__,
        "commit": measure.commit(),
        "command": command or recipe.command(),
        "recipe": recipe.to_json(),
        "classes": source.classes,
        "data": {
            "name": source.title,
            "train": source.train_size,
            "val": source.val_size,
            "split": source.split,
        },
        "network": {
            "name": recipe.model,
            "params": sum(p.numel() for p in model.parameters()),
            "flops": measure.count_flops(model, torch.zeros(shape)),
            "img_size": size,
            "in_chans": len(source.mean),
            "mean": list(source.mean),
            "std": list(source.std),
        },
        "machine": measure.machine(),
        "versions": measure.versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def metadata(recipe: Recipe, about: dict[str, Any], point: dict[str, float], crop: float) -> dict[str, str]:
    """What load_network needs to build the network again and to show it images."""
    of = about["network"]
    kind = recipe.augment.interpolation
    return {
        "model": recipe.model,
        "mechanism": recipe.mechanism or "",
        "model_args": json.dumps(recipe.model_args),
        "num_classes": str(len(about["classes"])),
        "classes": json.dumps(about["classes"]),
        "img_size": str(of["img_size"]),
        "in_chans": str(of["in_chans"]),
        "mean": json.dumps(of["mean"]),
        "std": json.dumps(of["std"]),
        "eval_crop": str(crop),
        "interpolation": "bicubic" if kind == "random" else kind,
        "epoch": str(point["epoch"]),
        "top1": str(point["top1"]),
    }


def save_verdicts(folder: Path, verdicts: Tensor) -> None:
    """evaluation.npz; see Classification.verdict."""
    k = (verdicts.shape[1] - 4) // 2
    columns: dict[str, Any] = {
        "labels": verdicts[:, 1].long().numpy(),
        "truth": verdicts[:, 3].float().numpy(),
        "top": verdicts[:, 4 : 4 + k].long().numpy(),
        "probabilities": verdicts[:, 4 + k :].float().numpy(),
    }
    content = io.BytesIO()
    np.savez_compressed(content, **columns)
    replace_file(folder / "evaluation.npz", lambda path: path.write_bytes(content.getvalue()))


def gallery(source: Source, verdicts: Tensor) -> list[dict[str, Any]]:
    """The held-out images that the network is most wrong and most right about."""
    by_loss = verdicts[:, 2].argsort(descending=True, stable=True)
    count = min(PICTURES, len(by_loss) // 2)
    chosen = [("worst", row) for row in by_loss[:count]] + [("best", row) for row in by_loss.flip(0)[:count]]
    pictures = []
    for kind, row in chosen:
        position, label, _, truth, predicted = verdicts[row][:5].tolist()
        found = source.picture(int(position))
        if found is None:
            return []
        image, name = found
        image.thumbnail((160, 160))
        file = io.BytesIO()
        image.save(file, "PNG")
        pictures.append(
            {
                "png": base64.b64encode(file.getvalue()).decode(),
                "name": name,
                "truth": source.classes[int(label)],
                "predicted": source.classes[int(predicted)],
                "probability": verdicts[row][4 + (verdicts.shape[1] - 4) // 2].item(),
                "truth_probability": truth,
                "kind": kind,
            }
        )
    return pictures


def report(folder: Path, console: Console) -> None:
    """report.html."""
    write_text(folder / "report.html", render_run(read_run(folder), Recipe().to_json()))
    console.print(f"{folder / 'report.html'} shows the run", highlight=False, markup=False, soft_wrap=True)

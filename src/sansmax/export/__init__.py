"""Networks as graphs that run elsewhere: torch.export's program, ONNX, and 8 bits; each checked before it is
kept.

    sansmax.export_model(network, "out")
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import Decoder
from ._graph import OPSETS
from ._int8 import KEPT, METHODS, Int8
from ._latency import softmax_twin
from ._runtime import Session
from ._subject import Size, Subject, images, point_clouds, stream
from ._tasks import of_run
from ._write import Plan, write

__all__ = [
    "FORMATS",
    "KEPT",
    "METHODS",
    "OPSETS",
    "Int8",
    "Session",
    "Subject",
    "export_model",
    "images",
    "of_run",
    "point_clouds",
    "softmax_twin",
    "stream",
]

FORMATS = {"onnx": ("onnx",), "program": ("program",), "both": ("onnx", "program")}


def export_model(
    model: nn.Module | Subject,
    out: str | Path,
    *,
    format: str = "both",
    img_size: Sequence[int | tuple[int, int]] = (),
    opset: int | None = None,
    optimize: bool = True,
    require_exp_free: bool = False,
    int8: Int8 | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    latency: float = 0.0,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the graphs of a network into the new folder `out`, whole or not at all.

    model.onnx, model.pt2 (torch.export), model.int8.onnx, README.md (the model card) and report.json, which
    holds what the function returns. Height, width and the like are free in the graphs where the network
    leaves them free; the batch is. Outputs are compared with PyTorch's in float64 first, at two sizes where
    they are free, batches of 1 and 3: ONNX Runtime and the program may err 8 times as much as PyTorch's
    float32, plus a millionth of the largest output.

    Args:
        model: a network of images; a sansmax.models.Decoder, of which one step is exported, with its state as
            inputs and outputs; or what images(), point_clouds() or stream() of this package make.
        format: onnx, program or both.
        img_size: sides, or (height, width), of the images; more than one only where they are free. The first
            is traced. Default: the network's own.
        opset: of ONNX, 18 to 23; None: PyTorch's default.
        optimize: sansmax.optimize_for_inference first.
        require_exp_free: refuse a graph that has an exponential.
        int8: a graph in 8 bits too.
        evaluate: figures of a module that stands for the network; called for PyTorch and every .onnx file.
        latency: seconds of measurement at each size; 0: none.
        about: name, task, classes, preprocessing and the like, for the card and the graphs' metadata.

    Raises:
        ValueError, OSError: `out` exists, there is no such graph, or its outputs are too far off; nothing is
            kept.
    """
    out = Path(out).expanduser()
    if format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
    if opset is not None and opset not in OPSETS:
        raise ValueError(
            f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset}; leave it out to take PyTorch's own"
        )
    if int8 is not None and "onnx" not in FORMATS[format]:
        raise ValueError(
            f"int8: expected format onnx or both, got {format}; 8 bits are made of the ONNX graph"
        )
    if out.exists():
        raise FileExistsError(
            f"out: expected a new folder, got {out}, which exists; name another, or remove it"
        )
    subject, sizes = _subject(model, img_size)
    plan = Plan(
        subject,
        sizes,
        FORMATS[format],
        opset,
        optimize,
        require_exp_free,
        int8,
        evaluate,
        latency,
        about or {},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        report = write(work, plan)
        work.chmod(0o755)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _subject(
    model: nn.Module | Subject, img_size: Sequence[int | tuple[int, int]]
) -> tuple[Subject, list[Size]]:
    """What is exported, on the CPU in float32 and eval mode, and the sizes that were asked for."""
    sizes = [(one, one) if isinstance(one, int) else tuple(one) for one in img_size]
    if isinstance(model, Decoder):
        model = stream(model)
    elif isinstance(model, nn.Module):
        config = getattr(model, "default_cfg", None) or {}
        if not sizes and not config.get("input_size"):
            raise ValueError(
                f"img_size: expected a size, got none, and {type(model).__name__} has no default_cfg that "
                "names one; give img_size"
            )
        channels, *own = config.get("input_size") or (3,)
        model = images(model, channels, sizes[0] if sizes else tuple(own))  # pyright: ignore[reportArgumentType]
    if sizes and "image" not in model.inputs:
        raise ValueError(
            f"img_size: expected none for {', '.join(model.inputs[:1])}, got {sizes[0]}; leave it out"
        )
    module = copy.deepcopy(model.module).to("cpu", torch.float32).eval().requires_grad_(False)
    sizes = sizes or [model.size]
    return replace(model, module=module, size=sizes[0]), sizes

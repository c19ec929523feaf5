"""How long one input takes: PyTorch, ONNX Runtime, and the same network with softmax attention."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bench.measure import interleaved, spread
from ..layers import Mixer
from ..layers.softmax import Softmax
from ._graph import traced, write_onnx
from ._runtime import Session
from ._subject import Size, Subject

__all__ = ["latencies", "softmax_twin"]


def softmax_twin(model: nn.Module) -> nn.Module | None:
    """The same network with softmax attention over the tokens, as wide and with as many heads, in place of
    every mechanism of sansmax, random weights; None where there is none to replace."""
    twin = copy.deepcopy(model)
    mixers = {name: one for name, one in twin.named_modules() if isinstance(one, Mixer)}
    if all(isinstance(mixer, Softmax) for mixer in mixers.values()):
        return None
    for name, mixer in mixers.items():
        twin.set_submodule(name, Softmax(mixer.dim, mixer.num_heads, qkv_bias=True))
    return twin.eval().requires_grad_(False)


def latencies(
    subject: Subject,
    graphs: dict[str, Path],
    sizes: list[Size],
    seconds: float,
    opset: int | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """A row for each size: name -> milliseconds of a batch of one (median, quartiles), sampled in turn, and
    how many times faster than PyTorch.

    Args:
        subject: as it was exported.
        graphs: name -> .onnx file.
        seconds: of each size.
        folder: for the twin's graph, which is removed.
    """
    calls: dict[str, Callable[..., Any]] = {"PyTorch": subject.module}
    calls |= {name: Session(path) for name, path in graphs.items()}
    twin = None if subject.start else softmax_twin(subject.module)
    if twin is not None:
        file = folder / "twin.onnx"
        write_onnx(traced(replace(subject, module=twin)), replace(subject, module=twin), file, opset, {})
        calls |= {"softmax, PyTorch": twin, "softmax, ONNX Runtime": Session(file)}
        for left in folder.glob("twin.onnx*"):
            left.unlink()
    rows = []
    for size in sizes:
        inputs = subject.example(1, size)
        timed = {name: torch.inference_mode()(partial(call, *inputs)) for name, call in calls.items()}
        samples = interleaved(timed, seconds=seconds)
        rows.append(
            {
                "size": list(size),
                "threads": torch.get_num_threads(),
                "milliseconds": {name: spread(taken, 1e3) for name, taken in samples.items()},
                "speedup": {
                    name: spread([a / b for a, b in zip(samples["PyTorch"], taken, strict=True)])
                    for name, taken in samples.items()
                },
            }
        )
    return rows

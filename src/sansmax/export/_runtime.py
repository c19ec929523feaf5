"""ONNX Runtime on the CPU, called with tensors, and how far a graph is from its network."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from ._subject import Size, Subject

__all__ = ["STEPS", "Session", "differences", "refused"]

# Against float64, of the largest output: a graph may err this many times as much as PyTorch's float32 does,
# plus this.
FACTOR, FLOOR = 8.0, 1e-6
BATCHES = 1, 3
STEPS = 50


class Session(nn.Module):
    """A .onnx file as a module: tensors in, tensors out."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own kinds
            raise ValueError(
                f"export: expected a graph that ONNX Runtime {onnxruntime.__version__} loads, got "
                f"{' '.join(str(error).split())[:300]}; choose another opset"
            ) from None
        self.names = [one.name for one in self.session.get_inputs()]

    def forward(self, *inputs: Tensor) -> Any:
        feeds = {name: x.numpy() for name, x in zip(self.names, inputs, strict=True)}
        try:
            outputs = [torch.from_numpy(y) for y in self.session.run(None, feeds)]
        except Exception as error:  # as above
            sizes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"export: expected a graph that ONNX Runtime runs on inputs of {sizes}, got "
                f"{' '.join(str(error).split())[:300]}; use the other format"
            ) from None
        return outputs if len(outputs) > 1 else outputs[0]


def refused(subject: Subject, size: Size) -> str:
    """Why the network does not take inputs of that size; "" where it does."""
    try:
        with torch.inference_mode():
            subject.module(*subject.example(1, size))
    except Exception as error:  # networks refuse with AssertionError, RuntimeError, ValueError and more
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@torch.inference_mode()
def differences(
    name: str, run: Callable[..., Any], subject: Subject, sizes: list[Size]
) -> list[dict[str, Any]]:
    """Of `run`, a graph of `subject`, a row for every size and batch.

    "difference" is the largest from PyTorch's outputs in float32, "error" the largest from those in float64,
    "pytorch" that of PyTorch's float32, each of the largest output; "budget" is what "error" may be. A stream
    is compared over 50 tokens, states included.

    Raises:
        ValueError: an error is above its budget.
    """
    wide = copy.deepcopy(subject.module).double()
    rows = []
    for size in sizes:
        for batch in BATCHES:
            want = list(_outputs(wide, subject, batch, size, torch.float64))
            plain = list(_outputs(subject.module, subject, batch, size))
            got = list(_outputs(run, subject, batch, size))
            own, error = _furthest(plain, want), _furthest(got, want)
            row = {"graph": name, "batch": batch, "size": list(size), "difference": _furthest(got, plain)}
            rows.append(row | {"error": error, "pytorch": own, "budget": FACTOR * own + FLOOR})
            if not error <= rows[-1]["budget"]:
                raise ValueError(
                    f"export: expected outputs of the {name} graph within {rows[-1]['budget']:.1e} of the "
                    f"largest, got {error:.1e} for a batch of {batch} at {'x'.join(map(str, size))}; nothing "
                    "is kept, use the other format, and report the network"
                )
    return rows


def _outputs(
    run: Callable[..., Any], subject: Subject, batch: int, size: Size, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    if not subject.start:
        yield from _listed(run(*_cast(subject.example(batch, size), dtype)))
        return
    state = [
        x if name in subject.unbatched else x.expand(batch, *x.shape[1:]).contiguous()
        for name, x in zip(subject.inputs[1:], _cast(subject.start, dtype), strict=True)
    ]
    generator = torch.Generator().manual_seed(batch)
    for _ in range(min(STEPS, subject.facts["longest"] or STEPS)):
        token = torch.randint(subject.facts["tokens"], (batch,), generator=generator)
        logits, *state = run(token, *state)
        yield logits
    yield from state


def _furthest(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference in any pair, of the largest finite entry of its second; inf where one is not
    finite and the other is."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 1.0
        gap = torch.where(a == b, 0, (a - b).abs()).amax().item() / (scale or 1.0)
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _listed(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)

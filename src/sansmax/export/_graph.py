"""The graph of a network: torch.export's program and the ONNX model made of it."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export import Dim, ExportedProgram

from ._census import every_node
from ._subject import Subject

__all__ = ["OPSETS", "free_axes", "traced", "write_onnx"]

# torch.onnx.export converts no graph to an older one, and has no newer one (torch 2.15).
OPSETS = range(18, 24)


def traced(subject: Subject) -> ExportedProgram:
    """The program, with a free batch, and further axes free as far as the network leaves them free.

    Raises:
        ValueError: there is no such program; one sentence says why.
    """
    axes = [
        {
            **({} if name in subject.unbatched else {0: Dim("batch")}),
            **dict.fromkeys(subject.axes.get(name, {}), Dim.AUTO),
        }
        for name in subject.inputs
    ]
    shapes: Any = (*axes[:2], tuple(axes[2:])) if subject.start else tuple(axes)
    example = subject.example(3, subject.size)
    try:
        with quiet():
            program = torch.export.export(subject.module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch's, its solver's and the network's own
        raise refusal("torch.export", error) from None
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # with paths of this machine
    return program


def free_axes(program: ExportedProgram, subject: Subject) -> dict[str, str]:
    """Symbol -> name of every axis of the inputs that the program leaves free, "batch" among them."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for name, user in zip(subject.inputs, program.graph_signature.user_inputs, strict=True):
        value: Any = values[str(user)]
        known = {**subject.axes.get(name, {}), **({} if name in subject.unbatched else {0: "batch"})}
        found |= {
            str(value.shape[i]): axis for i, axis in known.items() if not isinstance(value.shape[i], int)
        }
    return found


def write_onnx(
    program: ExportedProgram, subject: Subject, path: Path, opset: int | None, metadata: dict[str, str]
) -> None:
    """The model, checked by onnx, its axes named, `metadata` among its properties.

    Raises:
        ValueError: an operator has no ONNX form in this opset; one sentence says which.
    """
    names: Any = {"input_names": subject.inputs, "output_names": subject.outputs}
    try:
        with quiet():
            made = torch.onnx.export(program, (), dynamo=True, verbose=False, opset_version=opset, **names)
    except Exception as error:  # torch's and onnxscript's
        raise refusal("torch.onnx", error) from None
    assert made is not None
    made.save(path)
    model = onnx.load(path, load_external_data=False)
    got = next(one.version for one in model.opset_import if not one.domain)
    if opset is not None and got != opset:
        raise ValueError(
            f"opset: expected that the graph can be written in opset {opset}, got {got}; leave --opset out"
        )
    _name_axes(model.graph, free_axes(program, subject))
    for node in every_node(model.graph.node):
        del node.metadata_props[:]  # lines of source, with their paths: half of a small file
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    onnx.checker.check_model(path)


def _name_axes(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Symbols in the shapes, alone or in an expression, by the names of their axes."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), axis.dim_param)


def refusal(who: str, error: Exception) -> ValueError:
    """The innermost reason in one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__  # pyright: ignore[reportAssignmentType]
    words = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ValueError(
        f"export: expected a network that {who} can write down, got {words[:300].rstrip('.')}; choose "
        "another, or another format"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters tell their progress and advise their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

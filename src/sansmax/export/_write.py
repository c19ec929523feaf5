"""The files of an export, one after the other, each checked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.export import ExportedProgram

from ..bench._record import recorder
from ..layers import Mixer
from ..models import optimize_for_inference
from . import _census
from ._card import card
from ._graph import free_axes, traced, write_onnx
from ._int8 import Int8, quantize
from ._latency import latencies
from ._runtime import Session, differences, refused
from ._subject import Size, Subject

__all__ = ["Plan", "write"]

FILES = {"onnx": "model.onnx", "program": "model.pt2", "int8": "model.int8.onnx"}
RUNTIMES = {"onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}


@dataclass(frozen=True)
class Plan:
    """What was asked for; see export_model."""

    subject: Subject
    sizes: list[Size]
    formats: Sequence[str]
    opset: int | None
    optimize: bool
    require_exp_free: bool
    int8: Int8 | None
    evaluate: Callable[[nn.Module], dict[str, float]] | None
    latency: float
    about: dict[str, Any]


def write(folder: Path, plan: Plan) -> dict[str, Any]:
    """Everything into `folder`; returns the report."""
    subject = plan.subject
    # Ids of tokens have no fraction to fold with, and neither has what else takes several inputs.
    folds = plan.optimize and len(subject.inputs) == 1
    if folds:
        example = subject.example(1, subject.size)[0]
        module = optimize_for_inference(subject.module, example=example, channels_last=False)
        subject = replace(subject, module=module)
    found = _graphs(folder, plan, subject)
    if plan.require_exp_free and any(found["exponentials"].values()):
        some = ", ".join(f"{n} {name}" for one in found["exponentials"].values() for name, n in one.items())
        raise ValueError(
            f"require_exp_free: expected a graph without exponentials, got {some}; use a network whose every "
            "attention is SimA or XNorm, or leave it out"
        )
    files = {form: folder / FILES[form] for form in plan.formats}
    quantized = None
    if plan.int8 is not None:
        files["int8"] = folder / FILES["int8"]
        quantized = quantize(files["onnx"], files["int8"], plan.int8)
    runnable = {RUNTIMES[form]: path for form, path in files.items() if form in RUNTIMES}
    accuracy = {}
    if plan.evaluate is not None:
        stands_for = {"PyTorch": plan.subject.module} | {
            name: Session(path) for name, path in runnable.items()
        }
        accuracy = {name: plan.evaluate(module) for name, module in stands_for.items()}
    timed = []
    if plan.latency:
        timed = latencies(subject, runnable, found["checked"], plan.latency, plan.opset, folder)
    if subject.start:
        arrays = {name: x.numpy() for name, x in zip(subject.inputs[1:], subject.start, strict=True)}
        np.savez(folder / "start.npz", **arrays)  # pyright: ignore[reportArgumentType]
    mixers = [type(module).__name__ for module in subject.module.modules() if isinstance(module, Mixer)]
    record, _ = recorder(
        None,
        "cpu",
        about={"name": type(plan.subject.module).__name__} | plan.about,
        mechanisms={name: mixers.count(name) for name in dict.fromkeys(mixers)},
        parameters=sum(p.numel() for p in plan.subject.module.parameters()),
        folded=folds,
        facts=subject.facts,
        **found,
        int8=quantized,
        accuracy=accuracy,
        latency=timed,
        bytes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    (folder / "README.md").write_text(card(record), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _graphs(folder: Path, plan: Plan, subject: Subject) -> dict[str, Any]:
    """Writes the graphs with every axis free that can be used freely; what is known of them, and why an axis
    is not free."""
    if subject.start:  # the axis of a state that grows is no choice
        return _checked_graphs(folder, plan, subject, plan.sizes) | {"fixed": ""}
    fixed, sizes = replace(subject, axes={}), plan.sizes
    for size in sizes:
        if reason := refused(plan.subject, size):
            raise ValueError(
                f"img_size: expected sizes that the network takes, got {'x'.join(map(str, size))} "
                f"({reason}); leave it out"
            )
    if len(sizes) == 1:
        others = [size for size in subject.others if not refused(plan.subject, size)]
        if not others:
            reason = "the network takes one size alone"
            return _checked_graphs(folder, plan, fixed, sizes) | {"fixed": reason}
        sizes = [*sizes, others[0]]
    try:
        return _checked_graphs(folder, plan, subject, sizes) | {"fixed": ""}
    except ValueError as error:
        # An axis that is free by its shape may still serve one size alone.
        reason = str(error).removeprefix("export: ")
        return _checked_graphs(folder, plan, fixed, plan.sizes) | {"fixed": reason}


def _checked_graphs(folder: Path, plan: Plan, subject: Subject, sizes: list[Size]) -> dict[str, Any]:
    program = traced(subject)
    free = free_axes(program, subject)
    if len(free) == 1:
        if len(plan.sizes) > 1:
            raise ValueError(
                f"img_size: expected one size, because the graph of this network holds for one alone, got "
                f"{len(sizes)}; export each into a folder of its own"
            )
        sizes = plan.sizes
    rows, operators, opset = [], {}, None
    if "onnx" in plan.formats:
        file = folder / FILES["onnx"]
        texts = {key: x if isinstance(x, str) else json.dumps(x) for key, x in plan.about.items()}
        write_onnx(program, subject, file, plan.opset, texts)
        rows += differences("ONNX", Session(file), plan.subject, sizes)
        model = onnx.load(file, load_external_data=False)
        operators["ONNX"] = _census.of_onnx(model)
        opset = next(one.version for one in model.opset_import if not one.domain)
    if "program" in plan.formats:
        file = folder / FILES["program"]
        torch.export.save(program, file)
        rows += differences("torch.export", torch.export.load(file).module(), plan.subject, sizes)
        operators["torch.export"] = _census.of_program(program)
    exponentials = {graph: _census.exponentials(counts) for graph, counts in operators.items()}
    return {
        "inputs": _shapes(program, subject, free),
        "outputs": subject.outputs,
        "free": sorted(set(free.values())),
        "checked": sizes,
        "opset": opset,
        "operators": operators,
        "exponentials": exponentials,
        "differences": rows,
    }


def _shapes(program: ExportedProgram, subject: Subject, free: dict[str, str]) -> dict[str, str]:
    """Of every input: "float32 (batch, 3, height, width)"."""
    example = subject.example(3, subject.size)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for name, user, x in zip(subject.inputs, program.graph_signature.user_inputs, example, strict=True):
        value: Any = values[str(user)]
        sizes = ", ".join(free.get(str(size), str(size)) for size in value.shape)
        found[name] = f"{str(x.dtype).removeprefix('torch.')} ({sizes})"
    return found

"""Eight bits: static quantisation by ONNX Runtime, with what would lose accuracy left in float."""

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import Tensor

from .._find import pick

__all__ = ["KEPT", "METHODS", "Int8", "quantize"]

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
# What may stay in float: products of two activations (all of a mechanism's, its normalised ones included),
# sums of two (residual ones), and the last layer.
KEPT = ("products", "sums", "head")
TYPES = ["Conv", "Gemm", "MatMul", "Add"]


@dataclass(frozen=True)
class Int8:
    """How a graph becomes one of 8 bits.

    Attributes:
        calibration: inputs of the network, each a batch, that show which values its activations take.
        method: of choosing a range for them: minmax, entropy or percentile.
        keep: what stays in float, of KEPT.
        skipped: of the calibration, what could not be read: path and reason.
    """

    calibration: Sequence[Tensor]
    method: str = "minmax"
    keep: tuple[str, ...] = ("products", "sums")
    skipped: Sequence[dict[str, str]] = ()

    def __post_init__(self) -> None:
        pick("methods", self.method, METHODS)
        for kind in self.keep:
            pick("kinds of int8_keep", kind, KEPT)
        if not len(self.calibration):
            raise ValueError("calibration: expected inputs of the network, got none; give at least one batch")


def quantize(source: Path, target: Path, int8: Int8) -> dict[str, Any]:
    """Writes `target`; returns how many nodes are quantised and which kinds were kept.

    Weights are int8 with a scale for each output channel, in 7 bits, because processors with AVX2 and no VNNI
    saturate at 16 bits between two products; activations are uint8 with one scale.
    """
    model = onnx.load(source)
    kinds = _kinds(model.graph)
    left = [name for name, kind in kinds.items() if kind in ("biases", *int8.keep)]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_static(
                source,
                target,
                _Reader(model.graph.input[0].name, int8.calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=TYPES,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=left,
                calibrate_method=METHODS[int8.method],
                # One batch of activations in memory at a time.
                extra_options={"CalibStridedMinMax": 1},
            )
    finally:
        logging.disable(level)
    made = onnx.load(target)
    onnx.helper.set_model_props(made, {entry.key: entry.value for entry in model.metadata_props})
    onnx.save(made, target)
    return {
        "quantized": len(kinds) - len(left),
        "kept": {kind: sum(one == kind for one in kinds.values()) for kind in int8.keep},
        "method": int8.method,
        "batches": len(int8.calibration),
        "skipped": list(int8.skipped),
    }


def _kinds(graph: onnx.GraphProto) -> dict[str, str]:
    """Of every node that can be quantised: one of KEPT, "biases", or "" of other layers."""
    constants = {tensor.name for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in TYPES:
            weighted = any(name in constants for name in node.input)
            if node.op_type == "Add":
                found[node.name] = "biases" if weighted else "sums"
            else:
                found[node.name] = "" if weighted else "products"
    weights = [name for name, kind in found.items() if not kind]
    return found | ({weights[-1]: "head"} if weights else {})


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self.name, self.batches = name, batches
        self.rest = iter(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self.rest, None)
        return None if batch is None else {self.name: batch.numpy()}

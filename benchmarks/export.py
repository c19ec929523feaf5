"""What the graphs of `sansmax export` bring on a CPU: milliseconds of ONNX Runtime, float and int8, beside
PyTorch and the same network with softmax attention; and what int8 costs in accuracy.

    python benchmarks/export.py --runs RUN ... --root FOLDER --out results/export-cpu.json

FOLDER holds train/<class>/*.png and test/<class>/*.png; the runs were trained on the first. What is finished
is kept: the same command goes on.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import tyro

import sansmax.models  # noqa: F401 (registers the names)
from sansmax.bench import measure
from sansmax.export import Int8, export_model
from sansmax.tasks._data.split import open_split
from sansmax.train.checkpoint import read_json, write_json
from sansmax.train.evaluate import evaluate
from sansmax.train.network import load_network
from sansmax.train.predict import some_inputs
from sansmax.train.recipe import Data

HOW = (
    ("minmax", ("products", "sums")),
    ("entropy", ("products", "sums")),
    ("percentile", ("products", "sums")),
    ("minmax", ("products", "sums", "head")),
    ("minmax", ("sums",)),
    ("minmax", ("products",)),
    ("minmax", ()),
)


def main(
    out: str = "export.json",
    networks: tuple[str, ...] = ("sima_tiny_12_p16", "xvit_small_p16"),
    img_size: tuple[int, ...] = (224, 512),
    seconds: float = 30.0,
    runs: tuple[str, ...] = (),
    root: str = "",
    images: int = 2000,
    calibration: int = 256,
) -> None:
    """Measures and writes.

    Args:
        networks: timed with random weights; their ranges are those of noise, which changes no time.
        seconds: of measurement at each size.
        runs: folders of runs whose accuracy is measured, on `images` of root/test, with `calibration` images
            of root/train.
    """
    found: dict[str, Any] = read_json(Path(out)) or {"latency": {}, "accuracy": {}}
    told = {"commit": measure.commit(), "machine": measure.machine(), "versions": measure.versions()}
    for name in networks:
        if name not in found["latency"]:
            found["latency"][name] = timed(name, img_size, seconds)
            write_json(Path(out), found | told)
    for run in runs:
        name = load_network(run).name
        if name not in found["accuracy"]:
            found["accuracy"][name] = measured(run, root, images, calibration)
            write_json(Path(out), found | told)


def timed(name: str, sizes: tuple[int, ...], seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=sizes[0]).eval()
    noise = Int8([torch.randn(1, 3, sizes[0], sizes[0]) for _ in range(4)])
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(
            model, Path(folder, name), format="onnx", img_size=sizes, int8=noise, latency=seconds
        )
    for row in report["latency"]:
        print(
            name, row["size"], {k: f"{x['median']:.1f}" for k, x in row["milliseconds"].items()}, flush=True
        )
    kept = ("latency", "bytes", "differences", "operators", "free", "seconds")
    return {key: report[key] for key in kept if key in report} | {"load": [load, os.getloadavg()[0]]}


def measured(run: str, root: str, images: int, calibration: int) -> list[dict[str, Any]]:
    network = load_network(run)
    split = open_split(Data(root=root), "test").shuffled(images)
    inputs, _ = some_inputs(network, str(Path(root, "train")), calibration)

    def figures(module: torch.nn.Module) -> dict[str, float]:
        row = evaluate(network.with_outputs_of(module), split, device="cpu")
        return {key: row[key] for key in ("images", "top1", "loss")}

    rows = []
    for method, keep in HOW:
        with tempfile.TemporaryDirectory() as folder:
            report = export_model(
                network.model,
                Path(folder, "out"),
                format="onnx",
                img_size=[network.img_size],
                int8=Int8(inputs, method, keep),
                evaluate=figures,
            )
        rows.append(
            {"method": method, "keep": keep, "accuracy": report["accuracy"], "bytes": report["bytes"]}
        )
        top1 = {name: f"{100 * one['top1']:.2f}" for name, one in report["accuracy"].items()}
        print(network.name, method, keep, top1, flush=True)
    return rows


if __name__ == "__main__":
    tyro.cli(main)

"""The most memory of a whole process: inference at 4096 x 4096 px, training steps at 1024 px.

    python benchmarks/memory.py --out results/memory-cpu.json

Each row runs in a process of its own; what is reported is the largest resident set that the system saw,
libraries, weights and MKL's and oneDNN's scratch space included.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import tyro

import sansmax
from sansmax.bench import measure
from sansmax.train.checkpoint import write_json

# (network, mechanism, what, pixels, checkpointing)
ROWS = (
    ("sima_tiny_12_p16", None, "inference", 4096, False),
    ("xvit_tiny_p16", None, "inference", 4096, False),
    ("sima_small_12_p16", None, "training", 1024, True),
    ("sima_small_12_p16", None, "training", 1024, False),
    ("xcit_small_12_p16_224", None, "training", 1024, True),
    ("vit_small_patch16_224", "sima", "training", 1024, True),
    ("vit_small_patch16_224", "softmax", "training", 1024, True),
)


def measured(network: str, mechanism: str | None, what: str, pixels: int, checkpointing: bool) -> float:
    """GiB that this process has held at most, after one pass of one image in float32."""
    torch.manual_seed(0)
    model: Any = sansmax.create_model(network, mechanism, img_size=pixels)
    x = torch.rand(1, 3, pixels, pixels)
    if what == "inference":
        with torch.inference_mode():
            model.eval()(x)
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        model.train().set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(out: str = "memory.json", row: str | None = None) -> None:
    """Writes GiB for each row; with `row`, a JSON list, only prints them for that one."""
    if row is not None:
        print(measured(*json.loads(row)))
        return
    rows: list[dict[str, Any]] = []
    for one in ROWS:
        words = [sys.executable, __file__, "--row", json.dumps(one)]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        names = "network", "mechanism", "what", "pixels", "checkpointing"
        rows.append(dict(zip(names, one, strict=True)) | {"peak_gib": round(float(said.split()[-1]), 2)})
        print(rows[-1], flush=True)
    found = {"rows": rows, "commit": measure.commit(), "machine": measure.machine()}
    write_json(Path(out), found | {"versions": measure.versions()})


if __name__ == "__main__":
    tyro.cli(main)

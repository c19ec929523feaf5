"""Memory, time and error of predict --tile beside the network in one piece, on pictures made here.

    python benchmarks/tiles.py --folder pictures --out results/tiles-cpu.json

Each row runs in a process of its own. `anonymous` is the largest RssAnon of /proc/self/status, read every
20 ms: what the process itself holds; `resident` the largest resident set that the system saw, libraries and
mapped files included; `before` the anonymous memory with the network loaded, and no image yet.
"""

import copy
import json
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch
import tyro
from PIL import Image

import sansmax
from sansmax.bench import measure
from sansmax.tiles import scratch_bytes
from sansmax.train.checkpoint import write_json

NETWORK = "sima_tiny_12_p16"
SIDES = (2048, 8192, 16384)
# In one piece, 16,384 px need some four times the memory of 8,192.
ROWS = [("tiled", side) for side in SIDES] + [("whole", side) for side in SIDES[:2]]
SCALE: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CHECKED = {
    "sima": ("sima_tiny_12_p16", None, {}),
    "xnorm": ("xvit_u_p16", None, {}),
    "aft_simple": (
        "vit_tiny_patch16_224",
        "aft_simple",
        {"dynamic_img_size": True, "class_token": False, "global_pool": "avg"},
    ),
}


def picture(folder: Path, side: int) -> Path:
    """Coloured noise with structure of many sizes, computed and written a few rows at a time."""
    path = folder / f"noise-{side}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        cells: Any = (16, 256, 1024)
        noise = pyvips.Image.perlin
        bands: Any = [
            sum(noise(side, side, cell_size=cell, seed=seed, uchar=True) for cell in cells) / len(cells)
            for seed in (1, 2, 3)
        ]
        image = bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb")
        image.pngsave(str(path), compression=1)
    return path


def network(name: str, mechanism: str | None, words: dict[str, Any]) -> Any:
    """With random weights, and batch norms far from the identity."""
    torch.manual_seed(0)
    model = sansmax.create_model(name, mechanism, num_classes=10, **words)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]
    return model.eval()


def whole(path: Path) -> torch.Tensor:
    """The image as the network is given it, all at once."""
    Image.MAX_IMAGE_PIXELS = None
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float().div_(255)
    mean, std = (torch.tensor(t)[:, None, None] for t in SCALE.values())
    return pixels.sub_(mean).div_(std)[None]


def anonymous() -> float:
    """MiB."""
    found = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def measured(kind: str, side: int, folder: Path, tile: int) -> dict[str, Any]:
    """One row, in this process."""
    path, model = picture(folder, side), network(NETWORK, None, {})
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if kind == "tiled":
        logits = sansmax.predict_tiled(model, path, tile=tile, **SCALE)
    else:
        with torch.inference_mode():
            logits = model(whole(path))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "kind": kind,
        "side": side,
        "seconds": round(seconds, 1),
        "before": round(before),
        "anonymous": round(peak),
        "resident": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "scratch": scratch_bytes(model, (side, side)) if kind == "tiled" else 0,
        "logits": logits[0].tolist(),
    }


def errors(mechanism: str, folder: Path, tile: int) -> dict[str, Any]:
    """At 2,048 px, against the network in float64: the largest difference over the largest logit."""
    model, path = network(*CHECKED[mechanism]), picture(folder, SIDES[0])
    image = whole(path)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(image.double())
        found = {"whole": model(image), "tiled": sansmax.predict_tiled(model, path, tile=tile, **SCALE)}
    largest = exact.abs().max()
    return {"mechanism": mechanism, "network": CHECKED[mechanism][0]} | {
        name: ((y.double() - exact).abs().max() / largest).item() for name, y in found.items()
    }


def main(
    out: str = "tiles.json", folder: Path = Path("pictures"), tile: int = 1024, row: str | None = None
) -> None:
    """Writes all rows; with `row`, a JSON list, only prints that one."""
    if row is not None:
        kind, what = json.loads(row)
        print(
            json.dumps(errors(what, folder, tile) if kind == "error" else measured(kind, what, folder, tile))
        )
        return
    rows: dict[str, list[Any]] = {"memory": [], "errors": []}
    for one in [*(("error", name) for name in CHECKED), *ROWS]:
        words = [
            sys.executable,
            __file__,
            "--folder",
            str(folder),
            "--tile",
            str(tile),
            "--row",
            json.dumps(one),
        ]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        print(found, flush=True)
        rows["errors" if one[0] == "error" else "memory"].append(found)
        made = {"commit": measure.commit(), "machine": measure.machine(), "versions": measure.versions()}
        write_json(Path(out), {"network": NETWORK, "tile": tile, **rows, **made})


if __name__ == "__main__":
    tyro.cli(main)

"""What `sansmax.optimize_for_inference` brings: milliseconds of a forward pass, plain, folded, channels last.

python benchmarks/inference.py --out results/inference-cpu.json
"""

from pathlib import Path
from typing import Any

import timm
import torch
import tyro

import sansmax
import sansmax.models
from sansmax.bench import measure
from sansmax.train.checkpoint import write_json

NETWORKS = (
    "sima_small_12_p16",
    "sima_deit_small_p16",
    "sima_cvt_13",
    "soft_tiny",
    "xvit_small_p16",
    "eamlp_14",
)


def main(
    out: str = "inference.json",
    networks: tuple[str, ...] = NETWORKS,
    img_size: int = 224,
    batch: int = 1,
    seconds: float = 8.0,
) -> None:
    """Writes a row for each network: form -> milliseconds, and how many times faster than the plain one."""
    settings = {"img_size": img_size, "batch": batch, "seconds": seconds}
    rows: dict[str, Any] = {}
    for name in networks:
        torch.manual_seed(0)
        plain = timm.create_model(name, img_size=img_size).eval()
        x = torch.rand(batch, 3, img_size, img_size)
        models = {"plain": plain} | {
            words: sansmax.optimize_for_inference(plain, example=x, channels_last=last)
            for words, last in (("folded", False), ("folded, channels last", True))
        }
        calls = {words: torch.inference_mode()(lambda m=m, x=x: m(x)) for words, m in models.items()}
        samples = measure.interleaved(calls, seconds=seconds)
        rows[name] = {
            words: measure.spread(taken, 1e3)
            | {"speedup": measure.spread([a / b for a, b in zip(samples["plain"], taken, strict=True)])}
            for words, taken in samples.items()
        }
        print(
            name, {w: f"{r['median']:.1f} ms, {r['speedup']['median']:.2f}x" for w, r in rows[name].items()}
        )
    found = {"rows": rows, "settings": settings, "commit": measure.commit(), "machine": measure.machine()}
    write_json(Path(out), found | {"versions": measure.versions()})


if __name__ == "__main__":
    tyro.cli(main)

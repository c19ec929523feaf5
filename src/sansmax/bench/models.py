"""python -m sansmax.bench.models --out FILE.json: forward time of whole networks beside timm's, in one run.

Float32, batch 1, evaluation; the networks of a size are timed in turn. Before that, the logits are compared
with those of the same network in float64; where they are off by more than ERROR, no speed is given.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import models
from .._find import pick
from ._record import recorder
from .measure import count_flops, interleaved, peak_memory, spread

__all__ = ["main"]

NETWORKS = (
    "sima_small_12_p16",
    "soft_tiny",
    "xvit_small_p16",
    "eamlp_14",
    "aft_conv_small_p16_k11_h384",
)
BASELINES = ("deit_small_patch16_224", "xcit_small_12_p16_224")
# Relative to the largest logit.
ERROR = 5e-5


def main(
    out: Path,
    networks: tuple[str, ...] = NETWORKS,
    baselines: tuple[str, ...] = BASELINES,
    sizes: tuple[int, ...] = (224, 384, 512),
    seconds: float = 60.0,
    device: str = "cpu",
) -> int:
    """Times networks beside timm's.

    Args:
        out: the JSON file to write.
        networks: names of timm or sansmax.
        baselines: what the ratios are formed with.
        sizes: of square images, in pixels.
        seconds: time for one size; five samples of each network at least.
        device: "cpu" or "cuda".
    """
    from rich.console import Console

    known = dict.fromkeys([*models.networks(), *timm.list_models()])
    networks, baselines = (
        tuple(pick("networks", n, known) for n in names) for names in (networks, baselines)
    )
    console = Console()
    rows: list[dict[str, Any]] = []
    save = recorder(out, "sansmax.bench.models", rows, batch=1, dtype="float32", device=device)
    for size in sizes:
        console.print(f"{size} px", style="dim")
        rows += _size(size, (*networks, *baselines), baselines, seconds, device)
        save()
    console.print(_table(rows, baselines))
    return int(any("median_ms" not in row for row in rows))


def _size(
    size: int, names: tuple[str, ...], baselines: tuple[str, ...], seconds: float, device: str
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size, device=device)
    built = {name: timm.create_model(name, img_size=size).eval().to(device) for name in names}
    rows = {
        name: {
            "network": name,
            "size": size,
            "parameters": sum(p.numel() for p in network.parameters()),
            "gmacs": round(count_flops(network, x) / 2e9, 3),
            "error": _error(network, x),
        }
        for name, network in built.items()
    }
    right = [name for name in names if rows[name]["error"] <= ERROR]
    if not right:
        return list(rows.values())
    calls = {name: torch.inference_mode()(lambda network=built[name]: network(x)) for name in right}
    samples = interleaved(calls, seconds=seconds, device=device)
    for name in right:
        row, times = rows[name], spread(samples[name], 1e3)
        row |= {f"{key}_ms": value for key, value in times.items()}
        row |= {"samples": len(samples[name]), "peak_mb": peak_memory(calls[name], device) / 1e6}
    for name in right:
        for baseline in baselines:
            if baseline in right:
                # Of every round, so that the load of the machine cancels.
                ratios = [a / b for a, b in zip(samples[baseline], samples[name], strict=True)]
                rows[name][f"speedup_{baseline}"] = spread(ratios)
    return list(rows.values())


@torch.inference_mode()
def _error(network: nn.Module, x: torch.Tensor) -> float:
    want = copy.deepcopy(network).double()(x.double())
    return ((network(x).double() - want).abs().max() / want.abs().max()).item()


def _table(rows: list[dict[str, Any]], baselines: tuple[str, ...]):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        caption="x: times faster, median of the rounds; quartiles are in the file",
        caption_justify="left",
    )
    for title in ("px", "network"):
        table.add_column(title, no_wrap=True)
    for title in ("GMACs", "ms", "MB", *(f"x {b.partition('_p')[0]}" for b in baselines)):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row["size"]), row["network"], f"{row['gmacs']:.2f}"]
        if "median_ms" not in row:
            table.add_row(*cells, "wrong")
            continue
        ratios = [row.get(f"speedup_{baseline}") for baseline in baselines]
        table.add_row(
            *cells,
            f"{row['median_ms']:.1f}",
            f"{row['peak_mb']:.0f}",
            *(f"{ratio['median']:.2f}" if ratio else "-" for ratio in ratios),
        )
    return table


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main))

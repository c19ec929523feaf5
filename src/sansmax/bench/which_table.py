"""`sansmax which`: checks what is asked, shows a table for each size, and says where each begins to pay."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .._find import pick
from ..models._create import trunks
from ._record import recorder
from .measure import find_device
from .which import BASELINE, Found, Question, Timing, is_faster, mechanisms, which, words

__all__ = ["ask"]


def ask(
    network: str,
    sizes: Sequence[int],
    batch: int,
    chosen: Sequence[str],
    train: bool,
    budget: float,
    dtype: str,
    device: str,
    out: Path | None,
    console: Console,
    timing: Timing | None = None,
) -> None:
    """See sansmax.cli.which; `timing` stands for sansmax.bench.which.time_size."""
    if not sizes or min(sizes) < 1 or batch < 1 or not budget > 0:
        raise ValueError(
            "img_size, batch, budget: expected at least one size, and numbers above 0; leave them out"
        )
    device = find_device(device)
    network = pick("trunks", network.partition(".")[0], trunks())
    question = Question(network, batch, mechanisms(chosen), train, dtype, device)
    rows: list[dict[str, Any]] = []
    settings = dataclasses.asdict(question) | {"img_size": sorted(set(sizes)), "budget": budget}
    record, save = recorder(out, device, kind="which", settings=settings, rows=rows)

    def done(size: int, found: Mapping[str, Found]) -> None:
        rows.extend({"img_size": size, "mechanism": name, **row} for name, row in found.items())
        save()
        console.print(_table(question, size, found))

    record["words"] = words(which(question, sizes, budget, timing=timing, done=done))
    save()
    console.print("\n".join(record["words"]), highlight=False, markup=False, soft_wrap=True)


def _table(question: Question, size: int, found: Mapping[str, Found]) -> Table:
    used = {row["batch"] for row in found.values() if "batch" in row} - {question.batch}
    fewer = f", timed with {used.pop()} at a time to save time" if used else ""
    how = "training" if question.train else "evaluation"
    table = Table(
        title=f"{question.network}, {size} px, batch {question.batch}{fewer}, {how}",
        box=SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("mechanism", no_wrap=True)
    for title in ("ms per image", "times faster", "peak MB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    order = sorted(
        found, key=lambda name: (name != BASELINE, -found[name].get("faster", {}).get("median", 0))
    )
    for name in order:
        row = found[name]
        if "skipped" in row:
            table.add_row(name, "-", "-", "-", row["skipped"])
            continue
        ratio = row["faster"]["median"] if "faster" in row else None
        pays = "pays" if ratio is not None and name != BASELINE and is_faster(row) else ""
        told = "-" if ratio is None else f"{ratio:.2f}"
        table.add_row(name, f"{row['ms_per_image']['median']:.4g}", told, f"{row['peak_mb']:.0f}", pays)
    return table

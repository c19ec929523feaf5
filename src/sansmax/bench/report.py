"""The report of a comparison: one HTML file that needs no network, and the same table for the terminal."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import _page, _plots
from ._summary import BASELINE, COLUMNS, Results, rows, verdict

__all__ = ["render", "table"]


def render(results: Results, gallery: Sequence[Mapping[str, Any]] = ()) -> str:
    """`results` (the content of results.json, finished or not) as a page of HTML.

    Args:
        gallery: [{"png": bytes, "truth": str, "predictions": {mechanism: str}}], shown in this order.
    """
    mechanisms = results["mechanisms"]
    return _page.render(
        "_report.html.jinja",
        results=results,
        rows=rows(results),
        columns=COLUMNS,
        verdict=verdict(results),
        styles={name: _plots.styles(mechanisms)[name] for name in mechanisms},
        plots={name: Markup(svg) for name, svg in _plot(mechanisms).items()},
        ones={name: Markup(_one(name, mechanisms)) for name in mechanisms},
        gallery=[_picture(picture) for picture in gallery],
        longest=max((p["tokens"] for m in mechanisms.values() for p in m["sweep"]), default=0),
        several_seeds=any(len(m["runs"]) > 1 for m in mechanisms.values()),
        command=shlex.join(results["command"]),
        baseline=BASELINE,
    )


def _plot(mechanisms: Mapping[str, Any]) -> dict[str, str]:
    sweeps = {name: m["sweep"] for name, m in mechanisms.items()}
    runs = {name: m["runs"] for name, m in mechanisms.items()}
    crossovers = {name: m["crossover_tokens"] for name, m in mechanisms.items()}
    return {
        "latency": _plots.cost(sweeps, "latency_ms", "latency, ms", crossovers),
        "memory": _plots.cost(sweeps, "memory_mb", "peak memory, MB", {}),
        "accuracy": _plots.curves(runs, "accuracy", "validation accuracy, %"),
        "loss": _plots.curves(runs, "loss", "training loss"),
    }


def _one(name: str, mechanisms: Mapping[str, Any]) -> str:
    softmax = mechanisms[BASELINE]["sweep"] if BASELINE in mechanisms else []
    mechanism = mechanisms[name]
    if not mechanism["sweep"]:
        return ""
    return _plots.against_softmax(name, mechanism["sweep"], softmax, mechanism["crossover_tokens"])


def _picture(picture: Mapping[str, Any]) -> dict[str, Any]:
    truth, predictions = picture["truth"], picture["predictions"]
    return {
        **_page.picture(picture["png"]),
        "truth": truth,
        "mistakes": {name: said for name, said in predictions.items() if said != truth},
        "asked": len(predictions),
    }


def table(results: Results) -> Table:
    """The report's table for rich.print."""
    shown = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown.add_column("mechanism", no_wrap=True)
    for column in COLUMNS:
        shown.add_column(column.title.replace("accuracy", "acc."), justify="right")
    shown.add_column("faster\nfrom", min_width=6)
    for row in rows(results):
        cells = [
            Text(f"{cell.text}\n{cell.note}".strip(), style="bold green" if cell.best else "")
            for cell in row.cells
        ]
        crossover = row.crossover.removesuffix(" tokens").replace("about ", "~").replace("never up to ", ">")
        shown.add_row(Text(row.name), *cells, Text(crossover))
    return shown

"""Milliseconds against tokens or image size, as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ._plots import MUTED, Style, draw, label_ends, plain, styles
from .speed_table import ABOUT, name_of

__all__ = ["plot"]

RIVAL = Style(MUTED, MUTED, "", (4, 2))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A line for each operator, layer or network, dashed what it is measured against; a panel a pass."""
    rows = [row for row in rows if "forms" in row]
    if not rows:
        raise ValueError("plot: expected at least one row with a speed, got none; look at the notes")
    axis = "img_size" if "img_size" in rows[0] else "tokens"
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(6.2 * len(passes), 4.4), dpi=140)
    for i, name in enumerate(passes):
        width = 1 / len(passes)
        axes = plain(figure.add_axes((i * width + 0.11 * width, 0.13, 0.66 * width, 0.77)))
        lines = _lines([row for row in rows if row["pass"] == name], axis)
        looks = styles(line for line, rival in lines if not rival)
        looks |= {line: RIVAL for line, rival in lines if rival}
        for (line, _), points in lines.items():
            draw(axes, looks[line], *zip(*sorted(points.items()), strict=True))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row[axis] for row in rows})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("pixels a side" if axis == "img_size" else axis)
        axes.set_ylabel("milliseconds")
        axes.set_title(name, fontsize=10.5)
        ends = {line: max(points.items()) for (line, _), points in lines.items()}
        label_ends(figure, axes, ends, looks)
    figure.savefig(path, metadata={"Software": None})


def _lines(rows: Sequence[dict[str, Any]], axis: str) -> dict[tuple[str, bool], dict[int, float]]:
    """(name, whether it is what others are measured against) -> {size: milliseconds}."""
    varying = [
        key
        for key in ABOUT
        if key not in (axis, "pass", "op", "layer", "network")
        and len({str(row.get(key)) for row in rows}) > 1
    ]
    found: dict[tuple[str, bool], dict[int, float]] = {}
    for row in rows:
        settings = [str(row[key]) for key in varying if row.get(key) is not None]
        for form, figures in row["forms"].items():
            if form == "published":  # one for each operator: the table has them
                continue
            own = form == row["subject"]
            line = " ".join([name_of(row) if own else form, *settings])
            found.setdefault((line, not own), {}).setdefault(row[axis], figures["median_ms"])
    return found

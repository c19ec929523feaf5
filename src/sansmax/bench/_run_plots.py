"""The plots of training runs: curves of one run and of several, and the reliability diagram."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ._evaluation import Bin
from ._plots import MUTED, STYLES, Style, as_svg, draw, frame, label_ends, plain

__all__ = ["SERIES", "Line", "clock_unit", "curve", "palette", "reliability", "styles"]

POINTS = 240  # of a line; more cannot be told apart at this size
PALETTE = [
    *(STYLES[name] for name in ("aft_full", "sima", "soft", "external", "xnorm", "aft_conv", "softmax")),
    *(STYLES[name] for name in ("external_multihead", "soft_norm", "aft_local", "aft_simple")),
]
SERIES = {"training": PALETTE[0], "held-out": PALETTE[1]}

Line = tuple[Sequence[float], Sequence[float]]


def palette(count: int) -> dict[str, Style]:
    """{"1": style, ...}: the runs of a comparison have numbers for names."""
    return {str(i + 1): PALETTE[i % len(PALETTE)] for i in range(count)}


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Of the lines of a plot of one run."""
    names = list(names)
    free = iter(PALETTE[2:] if len(names) > 1 else PALETTE[1:])
    return {name: SERIES.get(name) or next(free) for name in names}


def clock_unit(seconds: float) -> tuple[str, float]:
    """In which unit a time axis of this length is drawn, and its seconds."""
    return ("hours", 3600) if seconds >= 7200 else ("minutes", 60) if seconds >= 120 else ("seconds", 1)


def curve(
    salt: str,
    lines: Mapping[str, Line],
    styles: Mapping[str, Style],
    x_label: str = "epoch",
    *,
    log: bool = False,
    marked: bool = True,
) -> str:
    """Lines by name over one axis; long ones as means of neighbours, up to two with their range as a shade.

    Args:
        salt: different for each plot of a page.
        log: logarithmic where the values allow it and span more than a factor of 20.
        marked: with markers, for lines of few points.
    """
    lines = {name: line for name, line in lines.items() if line[0]}
    named = len(styles) > 1
    figure, axes = frame(3.9, 2.75, left=0.15, right=0.8 if named else 0.97, bottom=0.165, top=0.97)
    ends = {}
    for name, (x, y) in lines.items():
        style = styles[name]
        x, y, low, high = _thinned(x, y)
        if low != high and len(styles) <= 2:
            axes.fill_between(x, low, high, color=style.light, alpha=0.15, linewidth=0)
        hidden = {} if marked or len(x) == 1 else {"marker": ""}
        draw(axes, style, x, y, markevery=max(1, len(x) // 8), markersize=4, **hidden)
        ends[name] = (x[-1], y[-1])
    values = [v for _, y in lines.values() for v in y]
    if log and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        # In wide ranges the locator thins out powers of ten, and finds no place for ticks between them.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1e3 * min(values) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(x_label)
    if named or not ends:
        label_ends(figure, axes, ends, styles)
    return as_svg(figure, salt, styles)


def _tick(value: float, _: Any) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], ...]:
    """At most POINTS points, means of neighbours, with the lowest and the highest of these."""
    parts = min(len(x), POINTS)
    xs, ys = np.array_split(x, parts), np.array_split(y, parts)
    means = [[float(part.mean()) for part in side] for side in (xs, ys)]
    return *means, [float(part.min()) for part in ys], [float(part.max()) for part in ys]


def reliability(bins: Sequence[Bin]) -> str:
    """Accuracy against confidence by bin, the diagonal of a calibrated network, below it how many images."""
    style = PALETTE[0]
    figure, axes = frame(3.9, 4.0, left=0.14, right=0.97, bottom=0.32, top=0.98)
    below = plain(figure.add_axes((0.14, 0.115, 0.83, 0.15)))
    filled = [b for b in bins if b.images]
    left, width = [b.low for b in filled], bins[0].high - bins[0].low
    _bars(axes, left, [b.accuracy for b in filled], width, style, 0.55)
    for b in filled:
        axes.plot([b.low, b.high], [b.confidence] * 2, color=PALETTE[1].light, linewidth=2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(3, 2))
    total = sum(b.images for b in bins)
    _bars(below, left, [b.images / total for b in filled], width, style, 0.9)
    for one in (axes, below):
        one.set_xlim(0, 1)
        one.xaxis.set_major_locator(MaxNLocator(5))
        one.xaxis.set_major_formatter(FuncFormatter(_percent))
        one.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_ylim(0, 1.02)
    axes.set_xticklabels([])
    axes.set_ylabel("right, %")
    below.yaxis.set_major_locator(MaxNLocator(2))
    below.set_ylabel("images, %")
    below.set_xlabel("probability of the prediction, %")
    return as_svg(figure, "reliability", {"training": style, "held-out": PALETTE[1]})


def _bars(axes: Axes, left, height, width: float, style: Style, alpha: float) -> None:
    axes.bar(left, height, width, align="edge", color=style.light, alpha=alpha, linewidth=0, zorder=2)


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:.3g}"

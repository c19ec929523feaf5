"""The report's plots: matplotlib, written as SVG that takes its colours and its font from the page."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

__all__ = [
    *("INK", "MUTED", "PAPER", "RULE", "STYLES", "Style", "against_softmax", "as_svg", "cost", "curves"),
    *("draw", "frame", "label_ends", "name_variable", "plain", "styles"),
]


class Style(NamedTuple):
    """How one mechanism looks in every plot; told apart by marker and dashes as well as by colour."""

    light: str
    dark: str
    marker: str
    dash: tuple[float, ...] = ()


# One hue a family, from the colour-blind-safe palettes of Okabe and Ito and of Paul Tol.
STYLES = {
    "softmax": Style("#3a4150", "#d5dae3", "s"),
    "sima": Style("#d55e00", "#ff8f45", "o"),
    "xnorm": Style("#b08600", "#e5b93c", "^"),
    "soft": Style("#00795a", "#2fc79b", "D"),
    "soft_norm": Style("#48a98a", "#8fe0c6", "d", (4, 2)),
    "external": Style("#99348a", "#d977c9", "v"),
    "external_multihead": Style("#c774b8", "#f0b3e5", "P", (4, 2)),
    "aft_full": Style("#0a5aa8", "#5aa5f0", "X"),
    "aft_local": Style("#4595dd", "#93c6f7", "<", (4, 2)),
    "aft_simple": Style("#33308c", "#9d9af0", ">", (1, 1.5)),
    "aft_conv": Style("#2aa5c4", "#6fdcf5", "p", (5, 1.5, 1, 1.5)),
}
# For mechanisms that are not listed above.
SPARE = (
    Style("#882255", "#e06c9f", "h"),
    Style("#999933", "#cccc55", "*"),
    Style("#7a5230", "#c99b6f", "H", (4, 2)),
    Style("#cc3311", "#ff7755", "8", (1, 1.5)),
)
INK, MUTED, RULE, PAPER = "#1b2130", "#667084", "#dfe3ea", "#fffffe"
PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

Point = Mapping[str, Any]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The same style for the same name in every report."""
    unknown = sorted(set(names) - set(STYLES))
    return STYLES | {name: SPARE[i % len(SPARE)] for i, name in enumerate(unknown)}


def cost(
    sweeps: Mapping[str, Sequence[Point]], key: str, label: str, crossovers: Mapping[str, int | None]
) -> str:
    """`key` ("latency_ms", "memory_mb") against tokens, log-log; a ring on softmax's line at a crossover."""
    figure, axes = frame(5.6, 4.3, right=0.745)
    ends = {}
    for name, points in sweeps.items():
        x, y = _xy(points, "tokens", key, positive=True)
        if x:
            _line(axes, name, x, y)
            ends[name] = (x[-1], y[-1])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _token_ticks(axes, [p["tokens"] for points in sweeps.values() for p in points])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    x, y = _xy(sweeps.get("softmax", ()), "tokens", key, positive=True)
    for name, tokens in crossovers.items():
        if tokens is not None and x and x[0] < tokens <= x[-1]:
            ring = {"mfc": "none", "mec": styles([name])[name].light, "ms": 9, "mew": 1.6, "zorder": 5}
            axes.plot([tokens], [_interpolate(tokens, x, y)], marker="o", linestyle="none", **ring)
    label_ends(figure, axes, ends, styles(ends))
    return as_svg(figure, f"cost-{key}", styles(sweeps))


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, label: str) -> str:
    """`key` ("loss", "accuracy") against epochs: the mean over seeds, the range over seeds behind it."""
    figure, axes = frame(5.6, 4.0, right=0.745)
    ends = {}
    for name, seeds in runs.items():
        by_epoch: dict[int, list[float]] = {}
        for run in seeds:
            for x, y in zip(*_xy(run["curve"], "epoch", key), strict=True):
                by_epoch.setdefault(int(x), []).append(y)
        if not by_epoch:
            continue
        x = sorted(by_epoch)
        y = [math.fsum(by_epoch[e]) / len(by_epoch[e]) for e in x]
        if any(len(values) > 1 for values in by_epoch.values()):
            low, high = ([f(by_epoch[e]) for e in x] for f in (min, max))
            axes.fill_between(x, low, high, color=styles([name])[name].light, alpha=0.13, linewidth=0)
        _line(axes, name, x, y, every=max(1, len(x) // 8))
        ends[name] = (x[-1], y[-1])
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    label_ends(figure, axes, ends, styles(ends))
    return as_svg(figure, f"curve-{key}", styles(runs))


def against_softmax(
    name: str, points: Sequence[Point], softmax: Sequence[Point], crossover: int | None
) -> str:
    """Small: latency of one mechanism and of softmax, the crossover as a vertical line."""
    figure, axes = frame(3.5, 1.75, left=0.13, right=0.98, bottom=0.2, top=0.97)
    for line, sequence in {"softmax": softmax, name: points}.items():
        x, y = _xy(sequence, "tokens", "latency_ms", positive=True)
        if x:
            _line(axes, line, x, y, size=3.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _token_ticks(axes, [p["tokens"] for p in (*softmax, *points)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    if crossover is not None and crossover > min(p["tokens"] for p in points):
        axes.axvline(crossover, color=MUTED, linewidth=1, dashes=(3, 2))
    return as_svg(figure, f"one-{name}", styles([name, "softmax"]))


def frame(width: float, height: float, *, right: float, left=0.115, bottom=0.125, top=0.975):
    """A figure, in inches, with axes that lie between these shares of it."""
    figure = Figure(figsize=(width, height))
    return figure, plain(figure.add_axes((left, bottom, right - left, top - bottom)))


def plain(axes: Axes) -> Axes:
    """Itself with the page's rules and inks."""
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    axes.tick_params(which="both", color=RULE, labelcolor=MUTED, labelsize=9, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=9.5)
    return axes


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], every: int = 1, size: float = 4.5):
    softmax = {"linewidth": 2.4, "zorder": 4} if name == "softmax" else {}
    draw(axes, styles([name])[name], x, y, markevery=every, markersize=size, **softmax)


def draw(axes: Axes, style: Style, x: Sequence[float], y: Sequence[float], **words: Any) -> None:
    """A line; `words` are matplotlib's."""
    (line,) = axes.plot(
        x,
        y,
        **{
            "color": style.light,
            "marker": style.marker,
            "markersize": 4.5,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.6,
            "linewidth": 1.5,
            "zorder": 3,
        }
        | words,
    )
    if style.dash:
        line.set_dashes(style.dash)


def _xy(points: Iterable[Point], x: str, y: str, positive: bool = False) -> tuple[list[float], list[float]]:
    """The finite points, by growing x; only those above 0 where the axis is logarithmic."""
    pairs = sorted((p[x], p[y]) for p in points if p.get(y) is not None and math.isfinite(p[y]))
    kept = [(a, b) for a, b in pairs if b > 0 or not positive]
    return [a for a, _ in kept], [b for _, b in kept]


def _interpolate(tokens: float, x: Sequence[float], y: Sequence[float]) -> float:
    for i in range(1, len(x)):
        if tokens <= x[i]:
            share = math.log(tokens / x[i - 1]) / math.log(x[i] / x[i - 1])
            return math.exp((1 - share) * math.log(y[i - 1]) + share * math.log(y[i]))
    return y[-1]


def _token_ticks(axes: Axes, tokens: Sequence[int]) -> None:
    low, high = min(tokens, default=64), max(tokens, default=1024)
    ticks = [4**i for i in range(16) if low / 1.5 <= 4**i <= high * 1.5]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))


def _short(count: int) -> str:
    return f"{count:,}".replace(",", "\N{THIN SPACE}")


def label_ends(
    figure: Figure,
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Style],
) -> None:
    """Each line's name beside the plot at the height of its end, moved apart where two would touch."""
    if not ends:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
        return
    figure.draw_without_rendering()
    height = axes.bbox.height
    to_axes = axes.transData + axes.transAxes.inverted()
    at = {name: to_axes.transform(end) for name, end in ends.items()}
    places = _apart({name: y for name, (_, y) in at.items()}, 11.5 * figure.dpi / 72 / height)
    for name, place in places.items():
        style = styles[name]
        axes.annotate(
            name,
            xy=tuple(at[name]),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=style.light,
            fontsize=9,
            fontweight="bold" if name == "softmax" else "normal",
            va="center",
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.light,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _apart(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights in 0..1 at least `gap` apart, in the same order and near the wanted ones.

    Neighbours that touch become one group around the mean of what they want, until none touch.
    """
    groups: list[tuple[list[str], float]] = []
    for name in sorted(wanted, key=lambda name: wanted[name]):
        members, centre = [name], wanted[name]
        while True:
            half = gap * len(members) / 2
            centre = min(max(centre, half - gap / 2), max(1 - half + gap / 2, half - gap / 2))
            if not groups or groups[-1][1] + gap * len(groups[-1][0]) / 2 <= centre - half + 1e-12:
                break
            members = groups.pop()[0] + members
            centre = sum(wanted[m] for m in members) / len(members)
        groups.append((members, centre))
    return {
        name: centre + gap * (i - (len(members) - 1) / 2)
        for members, centre in groups
        for i, name in enumerate(members)
    }


def as_svg(figure: Figure, salt: str, styles: Mapping[str, Style]) -> str:
    """An <svg> element that scales with its container; colours become the page's CSS variables."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "axes.unicode_minus": True}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)[ >].*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    # Groups are numbered alike in every figure; only shapes and clip paths are referred to.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", "var(--font)", svg)
    colours = {style.light: f"var(--{name_variable(name)})" for name, style in styles.items()} | PAGE
    pattern = "|".join(map(re.escape, colours))
    return re.sub(pattern, lambda match: colours[match[0]], svg)


def name_variable(name: str) -> str:
    """The CSS variable that holds a mechanism's colour."""
    return "m-" + re.sub(r"[^a-z0-9]", "-", name.lower())

"""The report of a training run, and of several beside each other: HTML that needs no network."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import _page, _run_plots
from ._evaluation import Evaluation, agreement, refusal
from ._summary import NONE, Cell, Column, cells, count, number
from .runs import RunRecord, differences, flat, read_run

__all__ = ["RunRecord", "read_run", "render_run", "render_runs", "table"]

OPEN_CLASSES, MOST_CLASSES = 50, 1000
MOST_CONFUSIONS = 20


def render_run(run: RunRecord, defaults: Mapping[str, Any] | None = None) -> str:
    """One run as a page.

    Args:
        defaults: a recipe in plain values; the fields that differ from it are marked.
    """
    return _page.render(
        "_run.html.jinja",
        run=run,
        tiles=_tiles(run),
        styles=_run_plots.SERIES,
        plots=_plots(run),
        evaluation=_evaluated(run.evaluation) if run.evaluation else None,
        gallery={kind: [_picture(p) for p in run.gallery if p["kind"] == kind] for kind in ("worst", "best")},
        recipe=_recipe(run.info["recipe"], defaults),
        words=_words,
        number=number,
        count=count,
    )


def render_runs(runs: Sequence[RunRecord]) -> str:
    """Several runs as a page that compares them."""
    recipes, others = differences(runs)
    return _page.render(
        "_runs.html.jinja",
        runs=runs,
        names=_names(runs),
        columns=COLUMNS,
        rows=_rows(runs),
        styles=_run_plots.palette(len(runs)),
        plots=_overlaid(runs),
        recipes=recipes,
        others=others,
        pairs=_pairs(runs),
        words=_words,
    )


def table(runs: Sequence[RunRecord]) -> Table:
    """The figures of runs for rich.print."""
    shown = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown.add_column("run", min_width=16, overflow="fold")
    for column in COLUMNS:
        shown.add_column(column.title.removesuffix(" / image"), justify="right")
    for name, row in zip(_names(runs), _rows(runs), strict=True):
        shown.add_row(
            Text(name), *(Text(c.text, style="bold green" if c.best and len(runs) > 1 else "") for c in row)
        )
    return shown


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _clock(seconds: float) -> str:
    """47.1 s, 12.1 min, 3.33 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def _best(key: str):
    return lambda run: (run.best or {}).get(key)


COLUMNS = (
    Column("top-1 %", "of the best evaluation", _best("top1"), _percent, max, True),
    Column("top-5 %", "of the same evaluation", _best("top5"), _percent, max),
    Column("loss", "cross-entropy on held-out images, same evaluation", _best("loss"), number, min),
    Column("epochs", "passes over the training images", lambda run: run.epochs_done, lambda v: f"{v:g}"),
    Column("params", "of the whole network", lambda run: run.info["network"].get("params"), count),
    Column(
        "FLOPs / image",
        "of one forward pass, two for each multiply-add",
        lambda run: run.info["network"].get("flops"),
        count,
    ),
    Column("img/s", "images per second in training, median", lambda run: run.images_per_s, number, max, True),
    Column("time", "training time", lambda run: run.seconds, _clock, min, True),
)


def _rows(runs: Sequence[RunRecord]) -> list[list[Cell]]:
    columns = [cells(column, {str(i): run for i, run in enumerate(runs)}) for column in COLUMNS]
    return [[column[str(i)] for column in columns] for i in range(len(runs))]


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in paths}) < len({*paths}):
        depth += 1
    return ["/".join(p[-depth:]) for p in paths]


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """[(what, figure, note)]: the headline."""
    best, last, recipe = run.best, run.last, run.info["recipe"]
    tiles = []
    for key, title in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        if best and last and key in best:
            note = f"best, after epoch {best['epoch']:g}"
            if last is not best and key in last:
                note += f"; {_percent(last[key])} % after epoch {last['epoch']:g}"
            tiles.append((title, f"{_percent(best[key])} %", note))
    if last and "loss" in last:
        tiles.append(("held-out loss", number(last["loss"]), f"after epoch {last['epoch']:g}"))
    done = run.epochs_done
    note = f"of {run.epochs:,}" + ("" if run.finished else ", going on or stopped")
    tiles.append(("epochs", f"{done:.4g}", note))
    if run.seconds is not None:
        tiles.append(("training time", _clock(run.seconds), f"batches of {recipe['batch_size']:,}"))
    if run.images_per_s is not None:
        waited = (
            "" if run.data_wait is None else f", {100 * run.data_wait:.0f} % of the time waiting for data"
        )
        tiles.append(("images/s", number(run.images_per_s), "median" + waited))
    tiles.append(("skipped steps", f"{run.skipped_steps:,}", "loss or gradient not finite"))
    tiles.append(("unreadable images", f"{len(run.skipped):,}", "left out"))
    return tiles


def _line(
    lines: Sequence[Mapping[str, Any]], key: str, factor: float = 1, x: str = "epoch", per: float = 1
) -> _run_plots.Line:
    kept = [line for line in lines if key in line and x in line]
    return [line[x] / per for line in kept], [factor * line[key] for line in kept]


def _plots(run: RunRecord) -> list[tuple[str, Markup]]:
    """[(title, plot)]"""
    loss = {"training": _line(run.train, "loss"), "held-out": _line(run.evals, "loss")}
    accuracy = {name: _line(run.evals, key, 100) for name, key in (("top-1", "top1"), ("top-5", "top5"))}
    if not accuracy["top-5"][0]:
        del accuracy["top-5"]
    plots = [
        ("Loss", "loss", loss, {"log": True}),
        ("Accuracy on held-out images, %", "accuracy", accuracy, {"marked": True}),
    ]
    for title, key, factor in (
        ("Learning rate", "lr", 1),
        ("Gradient norm", "grad_norm", 1),
        ("Training, images per second", "images_per_s", 1),
        ("Time spent waiting for data, %", "data_wait", 100),
    ):
        words = {"log": key == "grad_norm"}
        plots.append((title, key, {"training": _line(run.train, key, factor)}, words))
    drawn = []
    for title, salt, lines, words in plots:
        styles = {name: _run_plots.SERIES[name] for name in lines}
        marked = {"marked": False} | words
        drawn.append((title, Markup(_run_plots.curve(salt, lines, styles, "", **marked))))
    return drawn


def _overlaid(runs: Sequence[RunRecord]) -> list[tuple[str, Markup]]:
    unit, per = _run_plots.clock_unit(max((run.seconds or 0 for run in runs), default=0))
    styles = _run_plots.palette(len(runs))
    drawn = []
    for title, kind, key, factor in (
        ("Training loss", "train", "loss", 1),
        ("Held-out loss", "evals", "loss", 1),
        ("Top-1, %", "evals", "top1", 100),
    ):
        for x, scale, x_label in (("epoch", 1, "epoch"), ("seconds", per, unit)):
            lines = {
                str(i + 1): _line(getattr(run, kind), key, factor, x, scale) for i, run in enumerate(runs)
            }
            svg = _run_plots.curve(
                f"{kind}-{key}-{x}",
                lines,
                styles,
                "",
                x_label,
                log=key == "loss",
                marked=kind == "evals",
            )
            drawn.append((f"{title}, by {'epochs' if x == 'epoch' else 'time'}", Markup(svg)))
    return drawn


def _evaluated(evaluation: Evaluation) -> dict[str, Any]:
    shown, matrix = evaluation.confusion_matrix()
    names = evaluation.classes
    columns = [names[c] for c in shown]
    if len(shown) < len(names):
        columns.append("all others")
    confusions = evaluation.confusions()
    by_class = evaluation.by_class()
    sizes = np.bincount(evaluation.labels, minlength=len(names)).tolist()
    confidence, right = float(evaluation.probabilities[:, 0].mean()), float(evaluation.right.mean())
    folded = len(by_class) > OPEN_CLASSES
    return {
        "images": len(evaluation.labels),
        "right": right,
        "names": len(names),
        "shown": len(shown),
        "columns": columns,
        "matrix": [
            (names[c], [(int(n), n / max(1, row.sum())) for n in row[: len(columns)]])
            for c, row in zip(shown, matrix, strict=True)
        ],
        "confusions": [(names[a], names[b], n, n / sizes[a]) for a, b, n in confusions[:MOST_CONFUSIONS]],
        "mistakes": sum(n for *_, n in confusions),
        "kinds": len(confusions),
        "error": evaluation.calibration_error(),
        "confidence": confidence,
        "reliability": Markup(_run_plots.reliability(evaluation.reliability())),
        "by_class": by_class[:MOST_CLASSES],
        "open": 20 if folded else len(by_class),
        "all": len(by_class),
    }


def _picture(picture: Mapping[str, Any]) -> dict[str, Any]:
    return {**picture, **_page.picture(base64.b64decode(picture["png"]))}


def _recipe(recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """[{"field", "value", "default", "changed"}]"""
    base = flat(defaults or {})
    return [
        {
            "field": field,
            "value": value,
            "default": base.get(field),
            "changed": field in base and base[field] != value,
        }
        for field, value in flat(recipe).items()
    ]


def _words(value: Any) -> str:
    """A field's value as a flag takes it."""
    if value is None or value == "":
        return NONE
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value)) or NONE
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    found = []
    for i, first in enumerate(runs):
        for j in range(i + 1, len(runs)):
            a, b = first.evaluation, runs[j].evaluation
            why = refusal(a, b)
            same = agreement(a, b) if a and b and not why else None
            found.append({"first": str(i + 1), "second": str(j + 1), "agreement": same, "why": why})
    return found

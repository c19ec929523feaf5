"""The report of a training run, and of several beside each other: HTML that needs no network."""

import base64
import json
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
MOST_CONFUSIONS = 12


def render_run(run: RunRecord, defaults: Mapping[str, Any] | None = None) -> str:
    """One run as a page.

    Args:
        defaults: a recipe in plain values; the fields that differ from it are marked.
    """
    lines = _lines(run)
    return _page.render(
        "_run.html.jinja",
        run=run,
        tiles=_tiles(run),
        styles={k: v for plot in lines.values() for k, v in _run_plots.styles(plot).items()},
        plots=_plots(lines),
        evaluation=_evaluated(run.evaluation) if run.evaluation else None,
        gallery={kind: [_picture(p) for p in run.gallery if p["kind"] == kind] for kind in ("worst", "best")},
        pictures=_by_title(run.pictures),
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
        columns=_columns(runs),
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
    for column in _columns(runs):
        shown.add_column(column.title.partition(" / ")[0], justify="right")
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


def _columns(runs: Sequence[RunRecord]) -> list[Column]:
    """Of the table of runs of one task.

    Raises:
        ValueError: they are of several tasks.
    """
    if len(tasks := {run.task for run in runs}) > 1:
        raise ValueError(f"run: expected runs of one task, got {' and '.join(sorted(tasks))}; name fewer")
    first, *others = runs[0].figures.items()
    higher, unit = runs[0].info.get("higher", True), runs[0].unit
    best = max if higher else min

    def figure(key: str, title: str, note: str, best: Any, bold: bool) -> Column:
        words = _percent if title.endswith(", %") else number
        if key == "loss":
            note = f"on held-out {unit}, {note}"
        return Column(
            title.replace(", %", " %"), note, lambda run: (run.best or {}).get(key), words, best, bold
        )

    return [
        figure(*first, "of the best evaluation", best, True),
        *(figure(k, t, "of the same evaluation", min if k == "loss" else best, False) for k, t in others),
        Column(
            "epochs", f"passes over the training {unit}", lambda run: run.epochs_done, lambda v: f"{v:.4g}"
        ),
        Column("params", "of the whole network", lambda run: run.info["network"].get("params"), count),
        Column(
            f"FLOPs / {unit.removesuffix('s')}",
            "of one forward pass, two for each multiply-add",
            lambda run: run.info["network"].get("flops"),
            count,
        ),
        Column(
            "img/s" if unit == "images" else f"{unit}/s",
            f"{unit} per second in training, median",
            lambda run: run.per_s,
            number,
            max,
            True,
        ),
        Column("time", "training time", lambda run: run.seconds, _clock, None, True),
    ]


def _rows(runs: Sequence[RunRecord]) -> list[list[Cell]]:
    columns = [cells(column, {str(i): run for i, run in enumerate(runs)}) for column in _columns(runs)]
    return [[column[str(i)] for column in columns] for i in range(len(runs))]


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, each with as many of the folders above it as tell it apart."""
    paths = [run.folder.resolve().parts for run in runs]

    def name(path: tuple[str, ...]) -> str:
        ends = (path[-depth:] for depth in range(1, len(path) + 1))
        return "/".join(next(end for end in ends if all(p == path or p[-len(end) :] != end for p in paths)))

    return [name(path) for path in paths]


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """[(what, figure, note)]: the headline."""
    best, last, recipe = run.best, run.last, run.info["recipe"]
    tiles = []
    for key, title in run.figures.items():
        if not (best and last and key in best):
            continue
        share = title.endswith(", %")
        title, words = title.removesuffix(", %"), (lambda v: f"{_percent(v)} %") if share else number
        if key == "loss":
            tiles.append((f"held-out {title}", words(last[key]), f"after epoch {last['epoch']:g}"))
            continue
        note = f"best, after epoch {best['epoch']:g}"
        if last is not best and key in last:
            note += f"; {words(last[key])} after epoch {last['epoch']:g}"
        tiles.append((title, words(best[key]), note))
    done = run.epochs_done
    note = f"of {run.epochs:,}" + ("" if run.finished else ", going on or stopped")
    tiles.append(("epochs", f"{done:.4g}", note))
    if run.seconds is not None:
        tiles.append(("training time", _clock(run.seconds), f"batches of {recipe['batch_size']:,}"))
    if run.per_s is not None:
        waited = (
            "" if run.data_wait is None else f", {100 * run.data_wait:.0f} % of the time waiting for data"
        )
        tiles.append((f"{run.unit}/s", number(run.per_s), "median" + waited))
    tiles.append(("skipped steps", f"{run.skipped_steps:,}", "loss or gradient not finite"))
    tiles.append((f"unreadable {run.unit}", f"{len(run.skipped):,}", "left out"))
    return tiles


def _line(
    lines: Sequence[Mapping[str, Any]], key: str, factor: float = 1, x: str = "epoch", per: float = 1
) -> _run_plots.Line:
    kept = [line for line in lines if key in line and x in line]
    return [line[x] / per for line in kept], [factor * line[key] for line in kept]


def _lines(run: RunRecord) -> dict[str, dict[str, _run_plots.Line]]:
    """Of every plot, by title and name."""
    plots = {"Loss": {"training": _line(run.train, "loss"), "held-out": _line(run.evals, "loss")}}
    shares = {k: t for k, t in run.figures.items() if t.endswith(", %")}
    singles = [
        {k: t} for k, t in run.figures.items() if k not in shares and k != "loss"
    ]  # each has its scale
    for names in [shares, *singles]:
        lines = {
            t.removesuffix(", %"): _line(run.evals, k, 100 if k in shares else 1) for k, t in names.items()
        }
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            what = "Accuracy" if run.task == "classification" else _capital(", ".join(lines))
            plots[f"{what} on held-out {run.unit}" + ", %" * (names is shares)] = lines
    return plots | {
        "Learning rate": {"training": _line(run.train, "lr")},
        "Gradient norm": {"training": _line(run.train, "grad_norm")},
        f"Training, {run.unit} per second": {"training": _line(run.train, f"{run.unit}_per_s")},
        "Time spent waiting for data, %": {"training": _line(run.train, "data_wait", 100)},
    }


def _plots(lines: Mapping[str, Mapping[str, _run_plots.Line]]) -> list[tuple[str, Markup]]:
    """[(title, plot)]"""
    logarithmic = ("Loss", "Gradient norm")
    return [
        (
            title,
            Markup(
                _run_plots.curve(
                    title,
                    of_plot,
                    _run_plots.styles(of_plot),
                    log=title in logarithmic,
                    marked="held-out" in title,
                )
            ),
        )
        for title, of_plot in lines.items()
    ]


def _overlaid(runs: Sequence[RunRecord]) -> list[tuple[str, Markup]]:
    """[(title, plot)]: three against epochs, the same against time."""
    unit, per = _run_plots.clock_unit(max((run.seconds or 0 for run in runs), default=0))
    styles = _run_plots.palette(len(runs))
    score, figure = next(iter(runs[0].figures.items()))
    drawn = []
    for x, scale, label in (("epoch", 1, "epoch"), ("seconds", per, unit)):
        for title, kind, key, factor in (
            ("Training loss", "train", "loss", 1),
            ("Held-out loss", "evals", "loss", 1),
            (_capital(figure), "evals", score, 100 if figure.endswith(", %") else 1),
        ):
            lines = {
                name: _line(getattr(run, kind), key, factor, x, scale)
                for name, run in zip(styles, runs, strict=True)
            }
            title += ", against " + ("epochs" if x == "epoch" else "time")
            svg = _run_plots.curve(title, lines, styles, label, log=key == "loss", marked=kind == "evals")
            drawn.append((title, Markup(svg)))
    return drawn


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


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


def _by_title(pictures: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        found.setdefault(picture["title"], []).append(_picture(picture))
    return found


def _recipe(recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """[{"field", "value", "default", "changed"}]"""
    base = flat(recipe if defaults is None else defaults)
    return [
        {"field": field, "value": value, "default": base.get(field), "changed": base.get(field) != value}
        for field, value in flat(recipe).items()
    ]


def _words(value: Any) -> str:
    """A field's value as a flag takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(_words, value)) or NONE
    if isinstance(value, float):
        return f"{value:.10g}"
    return NONE if value in (None, "") else value if isinstance(value, str) else json.dumps(value)


def _pairs(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    found = []
    for i, first in enumerate(runs):
        for j in range(i + 1, len(runs)):
            a, b = first.evaluation, runs[j].evaluation
            why = refusal(a, b)
            same = agreement(a, b) if a and b and not why else None
            found.append({"first": str(i + 1), "second": str(j + 1), "agreement": same, "why": why})
    return found

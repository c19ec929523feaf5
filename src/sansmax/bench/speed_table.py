"""The table of `sansmax bench`, on the terminal and in Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["ABOUT", "markdown", "name_of", "show"]

# What tells one row from another, and its title.
ABOUT = {
    "op": "operator",
    "layer": "layer",
    "network": "network",
    "mechanism": "mechanism",
    "tokens": "tokens",
    "img_size": "px",
    "batch": "batch",
    "heads": "heads",
    "dim": "dim",
    "backend": "backend",
    "causal": "causal",
    "dtype": "dtype",
    "device": "device",
    "pass": "pass",
}
CAPTION = (
    "x: times faster than (+c: behind torch.compile); spread: between the quartiles, of the median; MB: peak "
    "beyond inputs and weights; ceiling: share of what a copy (m) or a matrix product (c) would take at least"
)
SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def name_of(row: dict[str, Any]) -> str:
    """The operator, layer or network."""
    return next(str(row[key]) for key in ("op", "layer", "network") if key in row)


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]], int]:
    """Titles, a line of cells for each row, and how many of the columns are words.

    What is the same in all rows is left out.
    """
    varying = [
        key
        for key in ABOUT
        if key in ("op", "layer", "network", "tokens", "img_size")
        or len({str(row.get(key)) for row in rows}) > 1
    ]
    varying = [key for key in varying if any(key in row for row in rows)]
    others = list(dict.fromkeys(other for row in rows for other in row.get("speedup", ())))
    # Where every row has others of its own, the cell names them.
    most = max((len(row.get("speedup", ())) for row in rows), default=0)
    named = len(others) > most
    titles = [ABOUT[key] for key in varying]
    titles += [
        "ms",
        "spread",
        *(["x"] * most if named else (f"x {_short(o)}" for o in others)),
        "MB",
        "ceiling",
    ]
    lines = []
    for row in rows:
        cells = [_word(row.get(key)) for key in varying]
        lines.append(cells)
        if "forms" not in row:
            cells += ["wrong" if row["wrong"] else "-", *[""] * (len(titles) - len(varying) - 1)]
            continue
        own = row["forms"][row["subject"]]
        ratios = {other: f"{ratio['median']:.2f}" for other, ratio in row["speedup"].items()}
        if named:
            faster = [f"{ratio} {other}" for other, ratio in ratios.items()]
            faster += ["-"] * (most - len(faster))
        else:
            faster = [ratios.get(other, "-") for other in others]
        cells += [
            f"{own['median_ms']:.3g}" if own["median_ms"] < 100 else f"{own['median_ms']:.0f}",
            f"{(own['high_ms'] - own['low_ms']) / own['median_ms']:.0%}",
            *faster,
            f"{own['peak_mb']:.1f}",
            f"{own['share']:.0%} {own['bound'][0]}",
        ]
    return titles, lines, len(varying)


def _short(other: str) -> str:
    return other.replace("published", "publ.").replace(", compiled", "+c")


def _word(value: object) -> str:
    return "own" if value is None else SHORT.get(str(value), str(value))


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        about = [str(row[key]) for key in ABOUT if row.get(key) is not None and key not in ("device",)]
        for note in row["notes"]:
            found.setdefault(note, []).append(", ".join(about))
    return [f"{'; '.join(where)}: {note}" for note, where in found.items()]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the table, and what is missing in it."""
    titles, lines, words = _cells(rows)
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, caption=CAPTION, caption_justify="left"
    )
    for i, title in enumerate(titles):
        if title in ("network", "x"):  # names of networks are long
            table.add_column(title, justify="left" if i < words else "right", overflow="fold")
        else:
            widest = max(len(title), *(len(line[i]) for line in lines))
            table.add_column(title, justify="left" if i < words else "right", min_width=widest, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # A number is never cut off: on a narrow terminal the lines run over.
    console.print(table, markup=False, width=max(console.width, console.measure(table).minimum), crop=False)
    for note in _notes(rows):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a page."""
    titles, lines, words = _cells(rows)
    rule = ["---"] * words + ["---:"] * (len(titles) - words)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines))
    notes = "".join(f"- {note}\n" for note in _notes(rows))
    return f"{table}\n\n{CAPTION}.\n" + (f"\n{notes}" if notes else "")

"""What the figures of a comparison say: the rows of its table, and its verdict in sentences."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    *("BASELINE", "COLUMNS", "NONE", "Cell", "Column", "Row"),
    *("cells", "count", "duration", "number", "rows", "verdict"),
]

Results = Mapping[str, Any]
Mechanism = Mapping[str, Any]
BASELINE = "softmax"
NONE = "\N{EN DASH}"


def number(value: float, digits: int = 3) -> str:
    """`digits` figures that count, no exponent: 0.0120, 1.23, 123, 12,300."""
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def count(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:,.0f}"


def duration(milliseconds: float) -> str:
    return f"{number(milliseconds / 1e3)} s" if milliseconds >= 1e3 else f"{number(milliseconds)} ms"


@dataclass(frozen=True)
class Column:
    title: str
    hint: str
    value: Callable[[Any], float | None]
    text: Callable[[float], str] = number
    best: Callable[[Iterable[float]], float] | None = None
    bar: bool = False


COLUMNS = (
    Column(
        "accuracy %",
        "of the validation images, mean over seeds; below it the lowest and the highest seed",
        lambda m: m["accuracy"]["mean"],
        lambda value: f"{value:.1f}",
        max,
    ),
    Column("params", "of the whole network", lambda m: m["params"], count),
    Column("FLOPs / image", "of one forward pass, two for each multiply-add", lambda m: m["flops"], count),
    Column("train img/s", "images per second", lambda m: m["images_per_s"], number, max, True),
    Column(
        "latency ms", "inference of one image, median", lambda m: m["latency_ms"]["median"], number, min, True
    ),
    Column(
        "memory MB", "the most held during that inference", lambda m: m["peak_memory_mb"], number, min, True
    ),
)


class Cell(NamedTuple):
    """A figure in words; `note`: range over seeds or ratio to softmax, `bar`: its share of the largest."""

    text: str
    note: str = ""
    bar: float = 0.0
    best: bool = False


class Row(NamedTuple):
    """One mechanism: a cell for each column, and from how many tokens on it is faster than softmax."""

    name: str
    cells: tuple[Cell, ...]
    crossover: str


def rows(results: Results) -> list[Row]:
    """The table: softmax first, then by falling accuracy."""
    mechanisms = results["mechanisms"]
    columns = [cells(column, mechanisms) for column in COLUMNS]
    return [
        Row(name, tuple(column[name] for column in columns), _crossover(name, mechanisms))
        for name in sorted(mechanisms, key=lambda n: (n != BASELINE, -(_accuracy(mechanisms[n]) or 0.0)))
    ]


def cells(column: Column, mechanisms: Mapping[str, Any]) -> dict[str, Cell]:
    """The column's cell for each name; the ratio to softmax where that is among them."""
    values = {name: _finite(column.value(m)) for name, m in mechanisms.items()}
    known = [value for value in values.values() if value is not None]
    best = column.best(known) if column.best and len(known) > 1 else None
    base = values.get(BASELINE)
    found = {}
    for name, value in values.items():
        if value is None:
            found[name] = Cell(NONE)
            continue
        if column.title.startswith("accuracy"):
            note = _seed_range(mechanisms[name])
        else:
            note = f"\N{MULTIPLICATION SIGN}{number(value / base, 2)}" if base and name != BASELINE else ""
        bar = value / max(known) if column.bar and max(known) > 0 else 0.0
        found[name] = Cell(column.text(value), note, bar, value == best)
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _accuracy(mechanism: Mechanism) -> float | None:
    return _finite(mechanism["accuracy"]["mean"])


def _seed_range(mechanism: Mechanism) -> str:
    low, high = mechanism["accuracy"]["min"], mechanism["accuracy"]["max"]
    return f"{low:.1f}{NONE}{high:.1f}" if len(mechanism["runs"]) > 1 else ""


def _crossover(name: str, mechanisms: Mapping[str, Mechanism]) -> str:
    tokens, sweep = mechanisms[name]["crossover_tokens"], mechanisms[name]["sweep"]
    if name == BASELINE or not sweep or not mechanisms.get(BASELINE, {}).get("sweep"):
        return NONE
    if tokens is None:
        return f"never up to {sweep[-1]['tokens']:,} tokens"
    if tokens <= sweep[0]["tokens"]:
        return f"{tokens:,} tokens or fewer"
    return f"about {number(tokens, 2)} tokens"


def verdict(results: Results) -> list[tuple[str, str]]:
    """[(subject, sentences)] that hold for these figures: accuracy and chance, cost here, cost beyond."""
    mechanisms = {n: m for n, m in results["mechanisms"].items() if _accuracy(m) is not None}
    paragraphs = []
    if mechanisms:
        paragraphs.append(("Accuracy", _on_accuracy(mechanisms, results["data"]["val"])))
    if BASELINE in mechanisms and len(mechanisms) > 1:
        paragraphs.append(("Cost at this size", _on_cost(mechanisms)))
        paragraphs.append(("With more tokens", _on_length(mechanisms)))
    missing = [name for name in results["config"]["mechanisms"] if name not in mechanisms]
    if missing:
        paragraphs.append(("Not finished", [f"{_list(missing)}."]))
    return [(subject, " ".join(sentences)) for subject, sentences in paragraphs if sentences]


def _on_accuracy(mechanisms: Mapping[str, Mechanism], images: int) -> list[str]:
    accuracy = {name: _accuracy(m) or 0.0 for name, m in mechanisms.items()}
    best = max(accuracy, key=lambda name: accuracy[name])
    sentences = [f"The highest is {best} with {accuracy[best]:.1f} %."]
    others = len(accuracy) - 1
    if BASELINE in accuracy and others:
        base = accuracy[BASELINE]
        if best != BASELINE:
            sentences[0] = f"{sentences[0][:-1]}; softmax has {base:.1f} %."
        margin = _chance(base, images)
        below = {n: a for n, a in accuracy.items() if a < base - margin}
        above = {n: a for n, a in accuracy.items() if a > base + margin}
        level = others - len(below) - len(above)
        parts = [
            f"{level} of {others} cannot be told from softmax" if level else "none is level with softmax"
        ]
        parts += [f"better: {_with(above)}"] if above else []
        parts += [f"worse: {_with(below)}"] if below else []
        sentences.append(
            f"With {images:,} validation images a difference below {margin:.1f} points can be chance: "
            f"{'; '.join(parts)}."
        )
    if all(len(m["runs"]) == 1 for m in mechanisms.values()):
        sentences.append("Each was trained once, so the spread over seeds is not known.")
    return sentences


def _chance(percent: float, images: int) -> float:
    """Two standard errors, in points, of the difference of two such proportions on so many images each."""
    share = percent / 100
    variance = max(share * (1 - share), 1 / (4 * images))
    return 200 * math.sqrt(2 * variance / images)


def _on_cost(mechanisms: Mapping[str, Mechanism]) -> list[str]:
    """In the network as trained: who beats softmax in inference, training and memory, beyond noise."""
    sentences = []
    for subject, value, sign, text in (
        ("Inference", lambda m: m["latency_ms"]["median"], -1, duration),
        ("Training", lambda m: m["images_per_s"], 1, lambda v: f"{number(v)} images/s"),
        ("Memory", lambda m: m["peak_memory_mb"], -1, lambda v: f"{number(v)} MB"),
    ):
        known = {n: v for n, m in mechanisms.items() if (v := _finite(value(m))) is not None}
        base = known.pop(BASELINE, None)
        if base is None or not known:
            continue
        ahead = sum(v >= 1.05 * base if sign > 0 else v <= 0.95 * base for v in known.values())
        best = max(known, key=lambda n: sign * known[n])
        nearest = f"{best} ({text(known[best])})"
        if ahead:
            who = f"{ahead} of {len(known)} beat softmax ({text(base)}) by 5 % or more, most {nearest}"
        else:
            who = f"none beats softmax ({text(base)}) by 5 %, the nearest is {nearest}"
        sentences.append(f"{subject}: {who}.")
    return sentences


def _on_length(mechanisms: Mapping[str, Mechanism]) -> list[str]:
    """One layer against another, by growing tokens."""
    base = {p["tokens"]: p["latency_ms"] for p in mechanisms[BASELINE]["sweep"]}
    swept = {n: m for n, m in mechanisms.items() if n != BASELINE and m["sweep"]}
    if not base or not swept:
        return []
    early = {n: m["crossover_tokens"] for n, m in swept.items() if m["crossover_tokens"] is not None}
    order = sorted(early, key=lambda n: early[n])
    sentences = []
    if order:
        names = [f"{n} ({_crossover(n, mechanisms)})" for n in order]
        if len(names) > 3:
            names = [f"{names[0]} is the first and {names[-1]} the last"]
        sentences.append(f"{len(early)} of {len(swept)} layers become faster than softmax: {_list(names)}.")
    longest = max(base)
    at_longest = {n: p["latency_ms"] for n, m in swept.items() for p in m["sweep"] if p["tokens"] == longest}
    if at_longest:
        best = min(at_longest, key=lambda n: at_longest[n])
        factor = base[longest] / at_longest[best]
        if factor > 1:
            sentences.append(
                f"At {longest:,} tokens, the most that softmax was measured with, {best} takes "
                f"{duration(at_longest[best])} and softmax {duration(base[longest])}, "
                f"{number(factor, 2)} times as long."
            )
    never = [n for n in swept if n not in early]
    if never:
        sentences.append(f"Never faster than softmax in the measured range: {_list(never)}.")
    return sentences


def _with(values: Mapping[str, float]) -> str:
    return _list([f"{n} ({v:.1f} %)" for n, v in sorted(values.items(), key=lambda item: -item[1])])


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

"""What has changed between two files of figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ._record import read_record
from .speed_table import ABOUT, SHORT

__all__ = ["Figures", "compare", "read"]

Key = tuple[tuple[str, Any], ...]
# A row of an older file does not tell these; they were fixed.
SINCE = {"backend": "auto", "mechanism": None}


def read(path: Path) -> "Figures":
    """The figures in a file of `sansmax bench`, also in one of sansmax.bench.ops and .models before it."""
    return Figures(read_record(path))


@dataclass(frozen=True)
class Figures:
    """A file's content, found by what tells its rows apart."""

    record: Mapping[str, Any]

    @cached_property
    def rows(self) -> dict[Key, dict[str, Any]]:
        """What tells a row apart -> the figures of the form that it is about; only rows with a speed."""
        return {_key(self.record, row): own for row in self.record["rows"] if (own := _own(row))}


def _own(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if "forms" in row:
        return row["forms"][row["subject"]]
    if "fused" in row:
        return row["fused"]
    return dict(row) if "median_ms" in row else None


def _key(record: Mapping[str, Any], row: Mapping[str, Any]) -> Key:
    found = dict(row)
    if "subject" not in row and "forms" not in row:
        settings = record.get("settings", {})
        found = {key: settings[key] for key in ("batch", "dtype", "device") if key in settings} | found
        if "op" in row:
            found |= {key: settings[key] for key in ("heads", "dim")} | {"backend": SINCE["backend"]}
        if "network" in row:
            found |= {"img_size": row["size"], "mechanism": SINCE["mechanism"], "pass": "forward"}
    return tuple((key, found[key]) for key in ABOUT if key in found)


def compare(old: Figures, new: Figures, fail_over: float) -> tuple[list[str], bool]:
    """A line for each row that both have, and whether one of them got worse.

    Worse: the lower quartile of the new times is above (1 + fail_over) times the upper quartile of the old
    ones, or the peak memory above (1 + fail_over) times the old one. Ratios are old over new, as "times
    faster": in brackets the extremes that the quartiles allow.
    """
    lines, worse = [], False
    for name in ("machine", "versions"):
        before, now = old.record.get(name) or {}, new.record.get(name) or {}
        different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if different:
            told = (f"{key} {before.get(key)} -> {now.get(key)}" for key in different)
            lines.append(f"another {name.removesuffix('s')}: {', '.join(told)}")
    common = [key for key in new.rows if key in old.rows]
    if not common:
        lines.append("the two files have no row in common")
    varying = {key for key in ABOUT if len({dict(row).get(key) for row in common}) > 1}
    for key in common:
        before, now = old.rows[key], new.rows[key]
        ratio = before["median_ms"] / now["median_ms"]
        low, high = before["low_ms"] / now["high_ms"], before["high_ms"] / now["low_ms"]
        slower = now["low_ms"] > before["high_ms"] * (1 + fail_over)
        larger = now["peak_mb"] > before["peak_mb"] * (1 + fail_over)
        worse |= slower or larger
        about = [SHORT.get(str(v), str(v)) for k, v in key if v is not None and (k in varying or _named(k))]
        verdict = [f"{before['median_ms']:.4g} -> {now['median_ms']:.4g} ms", f"{ratio:.2f}x"]
        verdict[-1] += f" ({low:.2f} to {high:.2f})" + (" SLOWER" if slower else "")
        megabytes = [f"{figures['peak_mb']:.4g}" for figures in (before, now)]
        if len(set(megabytes)) > 1:
            verdict.append(f"{' -> '.join(megabytes)} MB" + (" MORE" if larger else ""))
        lines.append(f"{', '.join(about)}: {', '.join(verdict)}")
    for missing, where in ((old.rows.keys() - new.rows, "old"), (new.rows.keys() - old.rows, "new")):
        if missing:
            lines.append(f"{len(missing)} rows only in the {where} file")
    return lines, worse


def _named(key: str) -> bool:
    return key in ("op", "layer", "network", "tokens", "img_size", "pass")

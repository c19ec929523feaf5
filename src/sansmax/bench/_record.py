"""Figures in a JSON file with all that they must carry."""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sansmax

from .ceilings import clock_mhz
from .measure import commit, machine, versions

__all__ = ["read_record", "recorder"]


def recorder(out: Path | None, device: str, **contents: Any) -> tuple[dict[str, Any], Callable[[], None]]:
    """What a file holds, and what writes it, as it is by then, whole or not at all.

    Machine, commit, versions, command, beginning, seconds and the clock in MHz at start and end stand in it
    before `contents`. Without `out` nothing is written.
    """
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"out: expected a file that ends in .json, got {out}; rename it")
        out.parent.mkdir(parents=True, exist_ok=True)
    start, clock = time.perf_counter(), clock_mhz(device)
    record: dict[str, Any] = {
        "sansmax": sansmax.__version__,
        "commit": commit(),
        "command": ["sansmax", *sys.argv[1:]],
        "machine": machine(),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **contents,
    }

    def save() -> None:
        record["seconds"] = round(time.perf_counter() - start, 1)
        record["clock_mhz"] = {"start": clock, "end": clock_mhz(device)}
        if out is None:
            return
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)

    return record, save


def read_record(path: Path) -> dict[str, Any]:
    """A file of `recorder`, of this version or of an older one.

    Raises:
        ValueError, OSError: it is no such file or cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise ValueError(f"{path}: expected figures of `sansmax bench` as JSON; name a file of its --out")
    return record

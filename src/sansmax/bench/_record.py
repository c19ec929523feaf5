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

from .measure import commit, machine, versions

__all__ = ["recorder"]


def recorder(out: Path, module: str, rows: list[dict[str, Any]], **settings: Any) -> Callable[[], None]:
    """What writes `rows`, as they are by then, whole or not at all, with machine, commit and versions."""
    out.parent.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    results: dict[str, Any] = {
        "sansmax": sansmax.__version__,
        "commit": commit(),
        "command": ["python", "-m", module, *sys.argv[1:]],
        "machine": machine(),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "rows": rows,
    }
    part = out.with_name(out.name + ".part")

    def save() -> None:
        results["seconds"] = round(time.perf_counter() - clock, 1)
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)

    return save

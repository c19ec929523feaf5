"""What the tables of one budget for every mechanism share: a file that goes on, and a single norm."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sansmax.bench import measure
from sansmax.layers import external
from sansmax.train.checkpoint import read_json, write_json

SINGLE = "external, one softmax"


def rows_of(out: str, settings: dict[str, Any], rows: dict[str, Callable[[], dict[str, Any]]]) -> dict:
    """The file's content; of `rows`, which are called one after the other, those that it lacks are added,
    and it is written after each.

    Raises:
        ValueError: the file has other settings.
    """
    found: dict[str, Any] = read_json(Path(out)) or {"settings": settings, "rows": {}}
    if found["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"out: expected {out} with the settings {settings}, got {found['settings']}; move it"
        )
    for name, row in rows.items():
        if name not in found["rows"]:
            found["rows"][name] = made = row() | {"commit": measure.commit()}
            write(out, found)
            print(name, json.dumps({k: v for k, v in made.items() if k != "curve"}), flush=True)
    return found


def write(out: str, found: dict[str, Any]) -> None:
    """With what a figure must carry."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *given]
    found |= {"command": command, "commit": measure.commit(), "machine": measure.machine()}
    write_json(Path(out), found | {"versions": measure.versions()})


def folder_of(runs: str, name: str) -> str:
    return f"{runs}/{''.join(c if c.isalnum() else '_' for c in name)}"


def mechanism_of(name: str) -> str:
    return name.partition(",")[0]


@contextlib.contextmanager
def norm_of(name: str) -> Iterator[None]:
    """Within it, external attention has one softmax over the memory rows, as attention has over its keys, if
    `name` is SINGLE."""
    double = external.recalled
    if name == SINGLE:
        external.recalled = _recalled_once
    try:
        yield
    finally:
        external.recalled = double


def _recalled_once(
    x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float, drop: nn.Dropout
) -> Tensor:
    return drop((x @ memory_k.mT).softmax(-1)) @ memory_v

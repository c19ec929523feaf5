"""Any attention module against the contract that this package's layers keep."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def main(
    module: Annotated[str, tyro.conf.Positional],
    /,
    init: str = "{}",
    mechanism: str | None = None,
    reference: str = "{}",
    tokens: int = 49,
    dim: int | None = None,
    layout: Literal["auto", "bnc", "nbc", "bchw", "bhnd"] = "auto",
    causal: bool = False,
    mask: Literal["auto", "keep", "drop"] = "auto",
    positional: bool = False,
    call: str = "{}",
    only: tuple[str, ...] = (),
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Runs every check on MODULE and prints a verdict of each; exit code 1 if one fails.

    Args:
        module: module:Class or path/to/file.py:Class; a function that makes the module serves as well. Its
            code is executed.
        init: words of the constructor as JSON: '{"dim": 64, "num_heads": 4}'.
        mechanism: what it claims to be, a name from `sansmax list`; its equation is then checked.
        reference: words, as JSON, of this package's layer that its parameters do not tell: '{"window": 8}'.
        tokens: of the first input; others are derived from it.
        dim: width of the input, where no word of INIT with a usual name holds it.
        layout: of the input: bnc (batch, tokens, channels), nbc, bchw (images) or bhnd (heads in front);
            auto is bnc, or nbc where the attribute batch_first is False.
        causal: it is causal without being asked at each call.
        mask: what True in its mask means; auto finds out.
        positional: the order of the tokens matters by design.
        call: more arguments of forward as JSON.
        only: names of checks (default: all).
        seed: of parameters and inputs.
        out: a .json file for all numbers.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..audit import checks, verdicts
    from ..audit._load import load

    if out is not None and out.suffix != ".json":
        raise ValueError(f"out: expected a file that ends in .json, got {out}; rename it")
    words = {"init": _object("init", init), "reference": _object("reference", reference)}
    words |= {"call": _object("call", call)}
    settings = {
        "mechanism": mechanism,
        "tokens": tokens,
        "dim": dim,
        "layout": layout,
        "causal": causal,
        "mask": mask,
        "positional": positional,
        "only": only,
        "seed": seed,
    }
    found = []
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checks", total=len(only) or len(checks()))
        for verdict in verdicts(load(module), **words, **settings):
            found.append(verdict)
            progress.advance(task)
    _print(console, found)
    if out is not None:
        _write(out, module, words | settings, found)
    if not any(verdict.passed is not None for verdict in found):
        raise ValueError(
            f"only: expected a check that applies to {module}, got "
            f"{', '.join(v.name for v in found)}; the table tells why they do not"
        )
    return int(any(verdict.passed is False for verdict in found))


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"""{name}: expected a JSON object, got {text!r}; write it as '{{"dim": 64}}', in quotes"""
        )
    return value


def _print(console: Any, verdicts: list[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    marks = {
        True: Text("passed", style="green"),
        False: Text("failed", style="bold red"),
        None: Text("-"),
    }
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("check", "verdict", "numbers and reason"):
        table.add_column(title, no_wrap=title != "numbers and reason", overflow="fold")
    for verdict in verdicts:
        table.add_row(verdict.name, marks[verdict.passed], Text(_told(verdict)))
    console.print(table)
    counts = [sum(v.passed is kind for v in verdicts) for kind in (True, False, None)]
    console.print(f"{counts[0]} passed, {counts[1]} failed, {counts[2]} not judged")


def _told(verdict: Any) -> str:
    """The reason, and the numbers that fit on a line."""
    shown = {
        key: value
        for key, value in verdict.numbers.items()
        if isinstance(value, str | bool | int | float) or (key in ("tokens", "flops") and value)
    }
    numbers = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in shown.items())
    return "; ".join(part for part in (verdict.reason, numbers) if part)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write(out: Path, module: str, settings: dict[str, Any], verdicts: list[Any]) -> None:
    from dataclasses import asdict

    from ..bench.measure import commit, machine, versions

    record = {
        "module": module,
        "settings": settings,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_plain(record), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """What JSON can say: infinity and NaN as words."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value

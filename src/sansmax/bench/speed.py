"""`sansmax bench`: measures cases one after the other, keeps the figures, shows them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from . import changes, speed_table
from ._record import recorder
from .cases import PASSES, Case, compiler_refusal, measured
from .ceilings import Ceilings, find_ceilings

__all__ = ["Settings", "speed"]


@dataclass(frozen=True)
class Settings:
    """How to measure, and where the figures go.

    Args:
        dtype: of inputs and weights.
        device: auto, cpu or cuda.
        passes: forward; forward+backward, with gradients of everything; train, also a step of AdamW.
        seconds: time for the samples of one row; five of each form at least.
        compile: also measure every form behind torch.compile.
        out: a .json file for all figures, written anew after every case.
        markdown: a .md file for the table.
        plot: a .png file for milliseconds against tokens or image size.
        compare: a .json file of an earlier run; prints what has changed since.
        fail_over: with `compare`, exit code 1 where a row is slower, or takes more memory, by more than this
            share beyond the quartiles.
    """

    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    device: str = "auto"
    passes: tuple[Literal["forward", "forward+backward", "train"], ...] = ("forward", "forward+backward")
    seconds: float = 1.0
    compile: bool = False
    out: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    compare: Path | None = None
    fail_over: float = 0.1


def speed(cases: Iterable[Case], settings: Settings, device: str, **about: Any) -> int:
    """Measures the cases, shows the table and what has changed; returns the exit code.

    Args:
        device: what settings.device stands for on this machine.
        **about: what else the file tells of the run.

    Returns:
        1 where a result is wrong or something got worse than `fail_over` allows, else 0.
    """
    for name, suffix in (("markdown", ".md"), ("plot", ".png")):
        path = getattr(settings, name)
        if path is not None and path.suffix != suffix:
            raise ValueError(f"{name}: expected a file that ends in {suffix}, got {path}; rename it")
    if settings.seconds < 0 or settings.fail_over < 0 or not settings.passes:
        raise ValueError("seconds, fail_over, passes: expected at least 0 and one pass; leave them out")
    cases = list(cases)
    old = changes.read(settings.compare) if settings.compare else None
    console, errors = Console(), Console(stderr=True)
    compiled = settings.compile
    if compiled and (refusal := compiler_refusal(device)):
        errors.print(f"torch.compile is left out, it does not work here: {refusal}", markup=False)
        compiled = False
    rows: list[dict[str, Any]] = []
    record, save = recorder(settings.out, device, settings=about | {"seconds": settings.seconds}, rows=rows)
    ceilings: dict[str, Ceilings] = {}
    passes = [name for name in PASSES if name in settings.passes]
    words = {"seconds": settings.seconds, "device": device, "compiled": compiled}
    for case in cases:
        errors.print(", ".join(str(v) for v in case.about.values() if v is not None), style="dim")
        dtype = case.about["dtype"]
        if dtype not in ceilings:
            ceilings[dtype] = find_ceilings(getattr(torch, dtype), device)
        try:
            rows += measured(case, passes, ceilings[dtype], **words)
        except torch.OutOfMemoryError:
            lost = {"wrong": False, "notes": ["it does not fit into the memory of the device"]}
            rows += [{**case.about, "pass": name, **lost} for name in passes]
        save()
    speed_table.show(rows, console)
    if settings.markdown is not None:
        settings.markdown.parent.mkdir(parents=True, exist_ok=True)
        settings.markdown.write_text(speed_table.markdown(rows), encoding="utf-8")
    if settings.plot is not None:
        from .speed_plot import plot

        settings.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, settings.plot)
    worse = False
    if old is not None:
        lines, worse = changes.compare(old, changes.Figures(record), settings.fail_over)
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return int(worse or any(row["wrong"] for row in rows))

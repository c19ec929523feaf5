"""The report of a training run, or of several beside each other."""

from pathlib import Path
from typing import Annotated

import tyro


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path | None = None) -> None:
    """Writes the report of one training run again, or a page that compares several, and prints the figures.

    Args:
        runs: folders of `sansmax train`, or folders that hold such folders.
        out: the page (default: RUN/report.html for one run, sansmax-report.html for several).
    """
    from rich.console import Console

    from sansmax.bench.run_report import read_run, render_runs, table
    from sansmax.bench.runs import find_runs
    from sansmax.train.artifacts import page
    from sansmax.train.checkpoint import write_text

    if not runs:
        raise ValueError("run: expected at least one folder of `sansmax train`, got none; name one")
    if out is not None and out.suffix not in (".html", ".htm"):
        raise ValueError(f"out: expected a file that ends in .html, got {out}; rename it")
    records = [read_run(folder) for folder in find_runs(runs)]
    if len(records) == 1:
        content = page(records[0])
        out = out or records[0].folder / "report.html"
    else:
        content = render_runs(records)
        out = out or Path("sansmax-report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, content)
    console = Console()
    console.print(table(records))
    console.print(f"{out} shows it with plots", highlight=False, markup=False)

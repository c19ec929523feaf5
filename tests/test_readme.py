"""The README's example runs as printed, and its table names every mechanism."""

import re
from pathlib import Path

from sansmax import _find

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 13
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([2, 10])\n"


def test_every_mechanism_is_in_the_table():
    table = README.read_text(encoding="utf-8").partition("## The mechanisms")[2].partition("\n## ")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert set(_find.names("sansmax.layers")) <= named

"""The README's example runs as printed, and its table names every mechanism."""

import re
from pathlib import Path

from sansmax import _find, models

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys):
    first, networks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(first.strip().splitlines()) <= 13
    exec(first, {})
    assert capsys.readouterr().out == "torch.Size([2, 10])\n"
    exec(networks, {})
    assert capsys.readouterr().out == "[(192, 24, 32), (192, 12, 16), (192, 6, 8), (192, 3, 4)]\n"


def test_every_network_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    assert f"{len(models.networks())} in all" in text
    table = text.partition("## The published networks")[2].partition("\n```")[0]
    patterns = []
    for pattern in re.findall(r"`([a-z*][\w{},*]*)`", table):
        pattern = re.sub(r"\{([^}]*)\}", lambda m: "(?:" + m[1].replace(",", "|") + ")", pattern)
        patterns.append(pattern.replace("*", r"\w+"))
    missing = [name for name in models.networks() if not any(re.fullmatch(p, name) for p in patterns)]
    assert not missing


def test_every_mechanism_is_in_the_table():
    table = README.read_text(encoding="utf-8").partition("## The mechanisms")[2].partition("\n## ")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert set(_find.names("sansmax.layers")) <= named

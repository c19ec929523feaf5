"""The README's example runs as printed, and its table names every mechanism."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from sansmax import _find, models, recipes
from sansmax.train.recipe import Recipe

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys):
    first, networks, owned = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(first.strip().splitlines()) <= 13
    exec(first, {})
    assert capsys.readouterr().out == "torch.Size([2, 10])\n"
    exec(networks, {})
    assert capsys.readouterr().out == "[(192, 24, 32), (192, 12, 16), (192, 6, 8), (192, 3, 4)]\n"
    made: dict = {}
    exec(owned, made)
    assert made["weights"].shape == (14, 14)
    assert len(made["report"].swapped) == 10


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


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_the_commands_that_train_are_understood(page):
    text = (README.parent / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "sansmax train " in line and "`" not in line]
    assert len(commands) >= 3
    for line in commands:
        name, *flags = shlex.split(line.partition("sansmax train ")[2], comments=True)
        base = Recipe() if name.startswith("-") else recipes.recipe(name)
        flags = [name, *flags] if name.startswith("-") else flags
        assert tyro.cli(Recipe, default=base, args=flags).checked()

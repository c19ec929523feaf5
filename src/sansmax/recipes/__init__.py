"""Training runs by name. A file without a leading underscore is a family of runs.

It holds one public function of the file's name, which returns a Recipe, and RUNS: the name of every run and
the arguments that give it. The function's docstring says what the run costs and what it should reach.
"""

import inspect
from collections.abc import Callable
from typing import Any

from .. import _find
from ..train.recipe import Recipe

__all__ = ["describe", "names", "recipe"]


def names() -> list[str]:
    """The names of all runs, by family."""
    return [name for family in _find.names(__name__) for name in _find.load(__name__, family).RUNS]


def recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest if there is none."""
    function, arguments = _family(name)
    return function(*arguments)


def describe(name: str) -> str:
    """What a run costs, what it should reach, and where it departs from the paper: its family's docstring."""
    return inspect.getdoc(_family(name)[0]) or ""


def _family(name: str) -> tuple[Callable[..., Recipe], tuple[Any, ...]]:
    name = _find.pick("recipes", name, names())
    families = {family: _find.load(__name__, family) for family in _find.names(__name__)}
    (family,) = (family for family, module in families.items() if name in module.RUNS)
    return getattr(families[family], family), families[family].RUNS[name]

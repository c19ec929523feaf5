"""A run of any task, written down and read again."""

from typing import Any

from .. import _find
from ..tasks import _recipes
from ..tasks._data.settings import Augment, Data
from ..tasks._recipes.classification import Distil, Recipe
from ..tasks._run import Optim, Run

__all__ = ["Augment", "Data", "Distil", "Optim", "Recipe", "Run", "read_recipe"]


def read_recipe(info: dict[str, Any]) -> Run:
    """The recipe in what recipe.json holds.

    Raises:
        ValueError: its task or a field is none of this version.
    """
    module = _find.load(_recipes.__name__, info.get("task", Recipe.task))
    return module.Recipe.from_json(info["recipe"])

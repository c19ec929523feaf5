"""The file name is the entry: what a package offers is what lies in its folder."""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def names(package: str) -> list[str]:
    """The public modules of `package`, sorted: every file or folder without a leading underscore.

    The package itself is not imported.
    """
    spec = importlib.util.find_spec(package)
    path = (spec and spec.submodule_search_locations) or []
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Imports `package.name`; raises ValueError that lists all names and the nearest if there is none."""
    return importlib.import_module(f"{package}.{pick(package.rpartition('.')[2], name, names(package))}")


def pick(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is in `known`, dashes read as underscores; else a ValueError with the nearest.

    Of more than 100 the message lists the five nearest alone.
    """
    known = list(known)
    if (found := name.replace("-", "_")) in known:
        return found
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown, rest = known, ""
    if len(known) > 100:
        shown = difflib.get_close_matches(found, known, n=5, cutoff=0)
        rest = f" or one of {len(known) - 5} others"
    raise ValueError(f"unknown name {name!r} in {kind}: expected one of {', '.join(shown)}{rest}{hint}")

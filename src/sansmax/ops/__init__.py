"""Tensors in, tensors out: one folder or file per operator, no module, no parameter, no configuration."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType


def operators() -> dict[str, tuple[ModuleType, Callable]]:
    """Every operator by its path below sansmax.ops: {"aft.full": (module, aft_full), "sima": ...}.

    An operator is a module with an `example`; its function is named like its path.
    """
    found = {}
    for info in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        path = info.name.removeprefix(f"{__name__}.")
        if any(part.startswith("_") or part in ("fused", "triton") for part in path.split(".")):
            continue
        module = importlib.import_module(info.name)
        if hasattr(module, "example"):
            found[path] = (module, getattr(module, path.replace(".", "_")))
    return found

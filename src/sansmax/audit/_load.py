"""A class or function from what a user calls it: module:Name or path/to/file.py:Name."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

__all__ = ["load", "maker", "sentence", "signature"]


def load(target: str) -> Callable[..., nn.Module]:
    """What `target` names; the folder of a file, or this one, is searched for its imports.

    Raises:
        ValueError: it cannot be imported, or is neither a class of modules nor a function.
    """
    source, colon, name = target.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(
            f"module: expected module:Class or path/to/file.py:Class, got {target!r}; put a colon before the "
            f"class"
        )
    found: Any = _imported(source)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            kinds = [key for key, value in vars(found).items() if _is_module_class(value)]
            raise ValueError(
                f"module: expected a class of {source}, got {name!r}, which it does not have; it has "
                f"{', '.join(sorted(kinds)) or 'no nn.Module'}"
            ) from None
    if inspect.isclass(found) and not _is_module_class(found):
        raise ValueError(
            f"module: expected a subclass of torch.nn.Module, got {target}, which is none; name the layer"
        )
    if not callable(found):
        raise ValueError(
            f"module: expected a class or a function that makes one, got {target}, a "
            f"{type(found).__name__}; name the layer's class"
        )
    return cast(Callable[..., nn.Module], found)


def _is_module_class(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _imported(source: str) -> Any:
    file = Path(source).expanduser()
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise ValueError(f"module: expected a file at {source}, got nothing; check the path")
    folder = str(file.resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(f"audited_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickles look their module up there
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever the code does when it is imported
        raise ValueError(
            f"module: expected {source} to be importable, got {sentence(error)}; run this where Python finds "
            f"it, or give the path of its file"
        ) from None


def maker(factory: Callable[..., nn.Module], words: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """`factory` with its words, after it has made one module.

    Raises:
        ValueError: the words are not what it takes.
    """

    def make() -> nn.Module:
        return factory(**words)

    name = getattr(factory, "__name__", str(factory))
    try:
        made = make()
    except Exception as error:  # whatever a constructor does with words that it does not take
        raise ValueError(
            f"init: expected words that {name}{signature(factory)} takes, got {dict(words)} and "
            f"{sentence(error)}; give them as JSON with --init"
        ) from None
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"module: expected {name} to make a torch.nn.Module, got a {type(made).__name__}; name the class"
        )
    return make


def signature(factory: Callable[..., Any]) -> str:
    """The parameters, without annotations: "(dim, num_heads=8)"."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))


def sentence(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, at most 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:200].rstrip(": ")

"""A conformance suite for attention modules, anybody's. One file a check: its name is the check's name.

A check is a file without a leading underscore with `check(subject) -> Verdict`; it may raise Refused, which
is told as a failure with the module's own words.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import _find
from ._load import maker
from ._subject import Refused, Settings, Subject, copied
from ._verdict import Verdict

__all__ = ["Settings", "Verdict", "audit", "checks", "verdicts"]


def checks() -> list[str]:
    """The names of all checks, which are the files of this folder."""
    return _find.names(__name__)


def audit(
    module_or_factory: nn.Module | Callable[..., nn.Module],
    *,
    init: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    **settings: Any,
) -> list[Verdict]:
    """Runs every check on an attention module: (B, N, C) -> (B, N, C), or another layout.

    The module is copied for each check, and stays as it is.

    Args:
        module_or_factory: a module, or a class or function that makes one.
        init: words of its constructor.
        only: names of checks; default: all.
        settings: fields of Settings:
            tokens: of the first input; others are derived from it.
            dim: width of the input, where no word or attribute with a usual name holds it.
            layout: "bnc", "nbc" (sequence first), "bchw", or "bhnd" (heads in front; with separate q, k and
                v each gets its own input); "auto" is bnc, or nbc where the attribute batch_first is False.
            mechanism: what it claims to be, a name from `sansmax list`: its equation, growth and behaviour
                are then compared with those of this package's layer.
            reference: words for this package's layer that cannot be read from the module's parameters
                ({"window": 8}).
            causal: it is causal without being asked at each call.
            mask: "keep" or "drop", what True in its mask means; "auto" finds out.
            positional: the order of the tokens matters by design.
            call: more arguments of forward.
            seed: of parameters and inputs.

    Returns:
        A verdict of each check, in alphabetical order.

    Raises:
        ValueError, TypeError: the module cannot be built or called, or a setting does not fit.
    """
    return list(verdicts(module_or_factory, init=init, only=only, **settings))


def verdicts(
    module_or_factory: nn.Module | Callable[..., nn.Module],
    *,
    init: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Verdict]:
    """As `audit`, one verdict at a time."""
    known = checks()
    names = [_find.pick("checks", name, known) for name in only] or known
    chosen = Settings(**settings)
    if chosen.mechanism is not None:
        mechanism = _find.pick("layers", chosen.mechanism, _find.names("sansmax.layers"))
        chosen = replace(chosen, mechanism=mechanism)
    if chosen.tokens < 3:
        raise ValueError(f"tokens: expected at least 3, got {chosen.tokens}; use 49")
    if isinstance(module_or_factory, nn.Module):
        if init:
            raise ValueError(
                f"init: expected none beside a module that is built, got {dict(init)}; pass its class"
            )
        make = copied(module_or_factory)
    else:
        make = maker(module_or_factory, init or {})
    subject = Subject(make, init or {}, chosen)
    for name in sorted(names):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            yield _judged(name, subject)


def _judged(name: str, subject: Subject) -> Verdict:
    try:
        return _find.load(__name__, name).check(subject)
    except Refused as refused:
        return Verdict(name, False, reason=str(refused))


class _Callable(ModuleType):
    """Lets sansmax.audit be the function as well as the package."""

    def __call__(self, *args: Any, **words: Any) -> list[Verdict]:
        return audit(*args, **words)


sys.modules[__name__].__class__ = _Callable

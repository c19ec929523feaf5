"""torch.compile in one graph, and again after a change of length."""

from typing import Any

import torch

from ._load import sentence
from ._subject import Refused, Subject, distance
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """fullgraph=True with the backend "eager": asked is whether it can be traced, at N and 2 N tokens."""
    module = subject.module()
    n = subject.settings.tokens
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    errors: dict[str, float] = {}
    torch.compiler.reset()
    for tokens in (n, 2 * n):
        x = subject.input(2, tokens)
        try:
            want = subject.value(module, x)
        except Refused:
            continue
        try:
            errors[str(tokens)] = distance(subject.value(compiled, x), want)
        except Refused as refused:
            cause = refused.__cause__
            told = sentence(cause) if cause is not None else str(refused)
            return Verdict("compiles", False, {"errors": errors}, f"{tokens} tokens: {told}")
    torch.compiler.reset()
    passed = max(errors.values()) <= subject.tolerance
    reason = "" if passed else "the compiled module gives other outputs"
    if passed and len(errors) == 1:
        reason = f"at {n} tokens alone, because it takes no others"
    return Verdict("compiles", passed, {"errors": errors}, reason)

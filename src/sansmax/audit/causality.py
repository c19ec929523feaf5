"""A later token changes no earlier output, where the module claims to be causal."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._subject import CAUSAL, Refused, Subject
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """From each of several tokens on all are replaced: by others, and by others 300 times as large.

    Told are the largest change of an earlier output, which token made it, and where.
    """
    module = subject.module(jitter=0.1)
    x = subject.input(2)
    extra, why = _asked(subject, module, x)
    if extra is None:
        return Verdict("causality", False if subject.settings.causal else None, reason=why)
    worst, token, place, seen = 0.0, 0, 0, 0.0
    want = subject.value(module, x, **extra)
    size = want.abs().max().item() or 1.0
    n = x.shape[1]
    for at in sorted({1, 2, n // 3, n // 2, n - 2, n - 1}):
        for scale in (1.0, 300.0):
            other = x.clone()
            other[:, at:] = subject.input(2, n - at, seed=3, scale=scale)
            got = subject.value(module, other, **extra)
            change = _change(got[:, :at], want[:, :at]) / size
            seen = max(seen, (_change(got[:, at:], want[:, at:]) / size).max().item())
            if change.max() > worst:
                worst, token, place = change.max().item(), at, int(change.argmax())
    numbers = {"change": worst, "token": token, "output": place, "change_behind": seen}
    if worst > subject.tolerance:
        reason = f"token {token} changes output {place}, which comes before it"
        return Verdict("causality", False, numbers, reason)
    reason = "" if seen else "no output depends on its token"
    return Verdict("causality", not reason, numbers, reason)


def _change(got: Tensor, want: Tensor) -> Tensor:
    """(B, N, C) -> (N,), the largest difference; inf where one is not finite."""
    return (got - want).abs().nan_to_num(nan=math.inf).amax((0, 2))


def _asked(subject: Subject, module: nn.Module, x: Tensor) -> tuple[dict[str, Any] | None, str]:
    """How the module is asked to be causal, or why it is not."""
    if subject.claims_causal:
        return {}, ""
    word = next((name for name in CAUSAL if name in subject.parameters), None)
    if word is None:
        return None, "not claimed: no --causal, and forward has no is_causal"
    forms: list[dict[str, Any]] = [{word: True}]
    if "attn_mask" in subject.parameters:
        n = x.shape[1]
        forms.append({word: True, "attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1)})
    why = ""
    for form in forms:
        try:
            subject.value(module, x, **form)
        except Refused as refused:
            why = why or f"not checked: {word}=True is refused: {refused}"
            continue
        return form, ""
    return None, why

"""float32, float16 and bfloat16: no NaN, no infinity, no silent zero, and near its own float64."""

import math
from typing import Any

import torch

from ._cost import many_tokens
from ._subject import Refused, Subject
from ._verdict import Verdict

# Of the largest output, at ordinary sizes.
BUDGET = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Below it an output may be 0 in that type.
SMALLEST = {torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 1e-6}
LARGE = {torch.float32: 1e3, torch.bfloat16: 100.0, torch.float16: 100.0}
SILENT = 1e-3  # share of outputs


def check(subject: Subject) -> Verdict:
    """Six inputs in each type: ordinary, small (1e-4), large, many tokens, many and large, all zero.

    Weights and input are rounded to the type first, and biases are 0. The error is judged where it is not the
    projections' own: with ordinary and small inputs.
    """
    n, many = subject.settings.tokens, many_tokens(subject)
    numbers: dict[str, Any] = {"many": many}
    reasons: list[str] = []
    unchecked = [] if many else [f"{4 * n} tokens are refused"]
    for dtype in BUDGET:
        kind = str(dtype).removeprefix("torch.")
        module = subject.module(dtype, biases=False)
        exact = subject.module(biases=False)
        with torch.no_grad():
            for mine, theirs in zip(exact.parameters(), module.parameters(), strict=True):
                mine.copy_(theirs)
        cases = {
            "ordinary": (n, 1.0),
            "small": (n, 1e-4),
            "large": (n, LARGE[dtype]),
            "many": (many, 1.0),
            "many and large": (many, LARGE[dtype]),
            "zero": (n, 0.0),
        }
        for case, (tokens, scale) in cases.items():
            if tokens == 0:
                continue
            x = subject.input(1, tokens, scale=scale).to(dtype)
            try:
                got = subject.value(module, x).to(subject.dtype)
            except Refused as refused:
                whom = unchecked if "not implemented for" in str(refused) else reasons
                whom.append(f"{kind}: {refused}")
                break
            want = subject.value(exact, x.to(subject.dtype))
            found = _compared(got, want, dtype)
            numbers[f"{kind}, {case}"] = found
            if found["not_finite"]:
                reasons.append(f"{kind}, {case}: {found['not_finite']:.0%} NaN or inf")
            elif found["silent_zero"] > SILENT:
                reasons.append(f"{kind}, {case}: {found['silent_zero']:.0%} silent zeros")
            elif scale and scale <= 1 and not found["error"] <= BUDGET[dtype]:
                reasons.append(f"{kind}, {case}: error {found['error']:.2g}")
    if not reasons and len(numbers) == 1:
        return Verdict("precision", None, numbers, f"not checked: {'; '.join(unchecked)}")
    return Verdict("precision", not reasons, numbers, "; ".join(reasons or unchecked))


def _compared(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Shares of wrong outputs, and the largest difference beyond the type's smallest step."""
    representable = want.isfinite() & (want.abs() < torch.finfo(dtype).max)
    bad = ~got.isfinite() & (representable | ~want.isfinite())
    zero = (got == 0) & (want.abs() > SMALLEST[dtype])
    difference = ((got - want).abs() - SMALLEST[dtype] / 4).clamp(min=0)
    size = want.abs().max().item()
    return {
        "not_finite": bad.double().mean().item(),
        "silent_zero": zero.double().mean().item(),
        "error": difference.max().nan_to_num(nan=math.inf).item() / size if size else 0.0,
    }

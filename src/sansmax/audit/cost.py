"""Linear or quadratic: FLOPs and the largest tensor at N, 2 N and 4 N tokens."""

import math
from typing import Any

from torch import Tensor, nn

from ._cost import LIMIT, flops_of, growth, largest_tensor
from ._reference import plain_reference
from ._subject import Refused, Subject, grid_of
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """Exponents of the growth; judged against this package's layer where the mechanism is known."""
    module, mechanism = subject.module(), subject.settings.mechanism
    for first in (256, subject.settings.tokens):
        lengths = [first, 2 * first, 4 * first]
        try:
            numbers = _counted(lambda x: subject(module, x), subject, lengths)
            break
        except Refused as refused:
            why = f"not checked, because of {lengths[-1]} tokens: {refused}"
    else:
        return Verdict("cost", None, reason=why)
    words = ", ".join(f"{_word(numbers[key])} {what}" for key, what in KINDS.items())
    if mechanism is None:
        return Verdict("cost", None, numbers, f"told, not judged: {words}")
    try:
        layer: nn.Module = plain_reference(subject)
        expected = _counted(
            lambda x: layer(x, is_causal=subject.claims_causal, grid=grid_of(x.shape[1])),
            subject,
            numbers["tokens"],
        )
    except (ValueError, TypeError) as error:
        return Verdict("cost", None, numbers, f"told, not judged: {words}; {error}")
    numbers["expected"] = {key: expected[key] for key in KINDS}
    # A map that is written out costs no more than its FLOPs do.
    power = math.ceil(max(1.0, expected["flops_growth"], expected["memory_growth"]) - 0.1)
    over = [what for key, what in KINDS.items() if numbers[key] > power + 0.1]
    reason = f"{words}; {mechanism} has fewer: {', '.join(over)}" if over else words
    return Verdict("cost", not over, numbers, reason)


KINDS = {"flops_growth": "FLOPs", "memory_growth": "memory"}


def _counted(call: Any, subject: Subject, lengths: list[int]) -> dict[str, Any]:
    flops, largest = [], []
    for tokens in lengths:
        if largest and 4 * largest[-1] > LIMIT:
            raise Refused(f"one tensor has {largest[-1] >> 20} MiB at half of {tokens} tokens")
        x: Tensor = subject.input(1, tokens)
        largest.append(largest_tensor(lambda x=x: call(x)))
        flops.append(flops_of(lambda x=x: call(x)))
    return {
        "tokens": lengths,
        "flops": flops,
        "largest_tensor_bytes": largest,
        "flops_growth": growth(flops),
        "memory_growth": growth(largest),
    }


def _word(exponent: float) -> str:
    if math.isclose(exponent, 0, abs_tol=0.1):
        return "constant"
    return "linear" if exponent <= 1.1 else "quadratic" if exponent <= 2.1 else "more than quadratic"

"""How the output's size changes when all tokens are repeated: 1 is invariant, 1/4 shrinks like 1/N."""

from torch import Tensor

from ._reference import plain_reference
from ._subject import Refused, Subject
from ._verdict import Verdict
from .permutation import unordered

TIMES = 4


def check(subject: Subject) -> Verdict:
    """The ratio of root mean squares at N and 4 N tokens, biases at 0, beside this package's layer."""
    x = subject.input()
    try:
        ratio = _ratio(subject, x, TIMES)
    except Refused as refused:
        return Verdict("token_scale", None, reason=f"not checked, because of {TIMES} N tokens: {refused}")
    numbers: dict[str, float] = {"ratio": ratio, "tokens": x.shape[1], "times": TIMES}
    if why := unordered(subject):
        return Verdict("token_scale", None, numbers, f"not judged: {why}")
    if subject.settings.mechanism is None:
        return Verdict("token_scale", None, numbers, "told, not judged: no --mechanism")
    try:
        layer = plain_reference(subject)
        one, four = (layer(t).square().mean().sqrt().item() for t in (x, x.repeat(1, TIMES, 1)))
    except (ValueError, TypeError) as error:
        return Verdict("token_scale", None, numbers, f"not judged: {error}")
    numbers["expected"] = four / one
    passed = abs(ratio / numbers["expected"] - 1) < 0.01
    reason = "" if passed else f"{subject.settings.mechanism} changes by {numbers['expected']:.3g}"
    return Verdict("token_scale", passed, numbers, reason)


def _ratio(subject: Subject, x: Tensor, times: int) -> float:
    module = subject.module(biases=False)
    one, many = (subject.value(module, t).square().mean().sqrt().item() for t in (x, x.repeat(1, times, 1)))
    return many / one if one else float("nan")

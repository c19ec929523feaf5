"""Any number of tokens: one, two, an odd number, and four times the first."""

from ._subject import Refused, Subject
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """Each length runs and gives finite outputs."""
    n = subject.settings.tokens
    wanted = [1, 2, n // 2 * 2 - 1, n, 4 * n]
    refused: dict[str, str] = {}
    for tokens in wanted:
        try:
            y = subject.value(subject.module(), subject.input(2, tokens))
        except Refused as error:
            refused[str(tokens)] = str(error)
            continue
        if not y.isfinite().all():
            refused[str(tokens)] = "the output is not finite"
    reason = "; ".join(f"{tokens} tokens: {why}" for tokens, why in refused.items())
    return Verdict("lengths", not refused, {"tokens": wanted, "refused": refused}, reason)

"""A sequence alone gives what it gives in a batch, whatever the others hold."""

import torch

from ._subject import Subject, distance
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """One sequence of ordinary size among very small, very large, constant and zero ones; then each alone."""
    module = subject.module(jitter=0.1)
    x = subject.input(6)
    sizes = x.new_tensor([1.0, 1e-3, 1e3, 1.0, 0.0, 1.0])
    x = x * sizes[:, None, None]
    x[3] = x[3, :1]  # all tokens equal
    together = subject.value(module, x)
    errors, undefined = [], 0
    for i in range(len(x)):
        alone = subject.value(module, x[i : i + 1])
        both_nan = not alone.isfinite().all() and torch.equal(
            alone.isfinite(), together[i : i + 1].isfinite()
        )
        undefined += both_nan
        errors.append(0.0 if both_nan else distance(together[i : i + 1], alone))
    worst = max(errors)
    passed = worst <= subject.tolerance
    reason = "" if passed else "a sequence's output depends on the others of its batch"
    return Verdict("batch", passed, {"change": worst, "sequences": len(x), "not_finite": undefined}, reason)

"""The same input gives the same output: in evaluation always, in training after the same seed."""

import torch
from torch import Tensor, nn

from ._subject import Subject
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """Bit for bit; in evaluation with another seed for each call."""
    x = subject.input()

    def seeded(module: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return subject.value(module, x)

    evaluated = subject.module()
    first, again = seeded(evaluated, 1), seeded(evaluated, 2)
    trained, repeated = (seeded(subject.module(train=True), 3) for _ in range(2))
    equal = {
        "evaluation": torch.equal(first, again),
        "training": torch.equal(trained, repeated),
    }
    numbers = equal | {"training_equals_evaluation": torch.equal(first, trained)}
    reason = "; ".join(f"two calls in {mode} differ" for mode, same in equal.items() if not same)
    return Verdict("determinism", not reason, numbers, reason)

"""torch.export gives a program with the same outputs."""

import torch

from ._load import sentence
from ._subject import Subject, distance
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """With any number of tokens where that is possible, else with the one it was exported with."""
    module = subject.module()
    n = subject.settings.tokens
    x = subject.input(2)
    call = _Tokens(subject, module)
    dynamic, error, why = False, 0.0, "its grid is fixed with the graph"
    if not subject.needs_grid:
        try:
            lengths = {"x": {1: torch.export.Dim("tokens", min=3, max=8 * n)}}
            program = torch.export.export(call, (x,), dynamic_shapes=lengths).module()
            other = subject.input(2, n + 2)
            error = distance(program(other), subject.value(module, other))
            dynamic = True
        except Exception as failure:  # of the tracer, in many kinds
            why = sentence(failure)
    if not dynamic:
        try:
            program = torch.export.export(call, (x,)).module()
            error = distance(program(x), subject.value(module, x))
        except Exception as failure:
            return Verdict("exports", False, {"any_length": False}, sentence(failure))
    numbers = {"error": error, "any_length": dynamic}
    if error > subject.tolerance:
        return Verdict("exports", False, numbers, "the program gives other outputs")
    return Verdict("exports", True, numbers, "" if dynamic else f"at {n} tokens alone: {why}")


class _Tokens(torch.nn.Module):
    """The module with tokens (B, N, W) as its only input."""

    def __init__(self, subject: Subject, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.call = module, subject

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)

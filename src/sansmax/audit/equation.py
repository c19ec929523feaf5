"""The outputs are those of the mechanism's literal equation in float64, with the same parameters."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ._reference import Unmapped, mapped_reference, reference_backend
from ._subject import Subject, distance, grid_of
from ._verdict import Verdict

# What eps, where published codes differ, explains.
TOLERANCE = 1e-6


def check(subject: Subject) -> Verdict:
    """Against this package's layer over its `reference` operators, for inputs of two sizes.

    The rows of one projection for queries, keys and values are tried as (q, k, v; head) and (head; q, k, v).
    """
    mechanism = subject.settings.mechanism
    if mechanism is None:
        return Verdict("equation", None, reason="not checked: no --mechanism")
    module = subject.module(jitter=0.1)
    state = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    try:
        errors = {order: _error(subject, module, s) for order, s in _orders(subject, state)}
    except Unmapped as reason:
        return Verdict("equation", None, reason=f"not checked: the parameters do not fit: {reason}")
    order, error = min(errors.items(), key=lambda item: item[1])
    numbers = {"error": error, "rows": order, "heads": subject.heads, "parameters": len(state)}
    passed = error <= max(TOLERANCE, subject.tolerance)
    return Verdict("equation", passed, numbers, "" if passed else f"not the equation of {mechanism}")


def _error(subject: Subject, module: nn.Module, state: dict[str, Tensor]) -> float:
    reference = mapped_reference(subject, state)
    worst = 0.0
    for scale in (1.0, 3.0):
        x = subject.input(scale=scale)
        with reference_backend(), torch.no_grad():
            want = reference(x, is_causal=subject.claims_causal, grid=grid_of(x.shape[1]))
        worst = max(worst, distance(subject.value(module, x), want))
    return worst


def _orders(subject: Subject, state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state, and the state with the rows of a joint projection as if they were (head; q, k, v)."""
    yield "q, k, v; head", state
    joint = [key for key in state if "qkv" in key.lower() or "in_proj" in key]
    if subject.heads > 1 and joint and all(len(state[key]) % (3 * subject.heads) == 0 for key in joint):
        other = dict(state)
        for key in joint:
            rows = state[key].unflatten(0, (subject.heads, 3, -1)).transpose(0, 1)
            other[key] = rows.flatten(0, 2)
        yield "head; q, k, v", other

"""Tokens in another order give the same outputs in that order."""

import torch

from .. import layers
from ._subject import Subject, distance
from ._verdict import Verdict


def unordered(subject: Subject) -> str:
    """Why the order of the tokens may matter; "" where it must not."""
    mechanism = subject.settings.mechanism
    if subject.settings.positional:
        return "told to be positional"
    if subject.claims_causal:
        return "it is causal"
    if mechanism is not None and (needs := layers.mechanism(mechanism).traits.needs):
        return f"{mechanism} knows the places of its tokens ({needs})"
    return ""


def check(subject: Subject) -> Verdict:
    """f(P x) = P f(x) for a random permutation P."""
    module = subject.module(jitter=0.1)
    x = subject.input()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(5))
    error = distance(subject.value(module, x[:, order]), subject.value(module, x)[:, order])
    numbers = {"change": error}
    if why := unordered(subject):
        return Verdict("permutation", None, numbers, f"not expected: {why}")
    if error <= subject.tolerance:
        return Verdict("permutation", True, numbers)
    reason = "the order of the tokens changes their outputs; give --positional if that is meant"
    return Verdict("permutation", False, numbers, reason)

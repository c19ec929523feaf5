"""An input with gaps, transposed or expanded in memory gives what its copy gives."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._subject import Refused, Subject, distance
from ._verdict import Verdict


def check(subject: Subject) -> Verdict:
    """Three views of the same numbers, and that the input stays as it was."""
    module = subject.module()
    tensors = subject.arranged(subject.input())
    with torch.no_grad():
        want = subject.run(module, tensors)
        numbers: dict[str, float] = {}
        reasons = []
        for name, view in VIEWS.items():
            viewed = [view(t) for t in tensors]
            kept = [t.clone() for t in viewed]
            expected = subject.run(module, kept) if name == "expanded" else want
            try:
                numbers[name] = distance(subject.run(module, viewed), expected)
            except Refused as refused:
                numbers[name] = float("inf")
                reasons.append(f"{name}: {refused}")
                continue
            if numbers[name] > subject.tolerance:
                reasons.append(f"{name}: another output than of the contiguous copy")
            if not all(map(torch.equal, kept, viewed)):
                reasons.append(f"{name}: the input has changed")
    return Verdict("strides", not reasons, numbers, "; ".join(reasons))


def _gaps(t: Tensor) -> Tensor:
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": _gaps,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand_as(t),
}

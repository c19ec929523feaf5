"""forward changes nothing but its result."""

from typing import Any

import torch
from torch import Tensor, nn

from ._subject import Subject
from ._verdict import Verdict

PLAIN = int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device


def check(subject: Subject) -> Verdict:
    """Parameters, buffers and attributes of every submodule before and after a call in evaluation."""
    module = subject.module()
    x = subject.input()
    given = subject.arranged(x)
    kept = [t.clone() for t in given]
    before = _state(module)
    with torch.no_grad():
        subject.run(module, given)
    after = _state(module)
    changed = sorted(
        key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))
    )
    if not all(map(torch.equal, kept, given)):
        changed.append("the input")
    reason = f"a call in evaluation changes {', '.join(changed)}" if changed else ""
    return Verdict("purity", not changed, {"changed": changed, "compared": len(before)}, reason)


def _state(module: nn.Module) -> dict[str, Any]:
    found = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            key = f"{path}.{name}".removeprefix(".")
            inner = value.items() if name in ("_parameters", "_buffers", "_modules") else [(None, value)]
            for own, content in inner:
                place = key if own is None else f"{path}.{own}".removeprefix(".")
                found[place] = (id(content), _copy(content))
    return found


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple | set):
        return [_copy(v) for v in value]
    if isinstance(value, dict):
        return {key: _copy(v) for key, v in value.items()}
    return id(value)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return False
    is_tensor = isinstance(a[1], Tensor) and isinstance(b[1], Tensor)
    return (not is_tensor or a[0] == b[0]) and _equal(a[1], b[1])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b

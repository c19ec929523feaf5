"""Every parameter trains: a gradient reaches it, and the optimizer's tensor is the one that forward uses."""

import torch
from torch import Tensor, nn

from ._subject import Refused, Subject, distance
from ._verdict import Verdict

STEPS = 3


def check(subject: Subject) -> Verdict:
    """Three steps of SGD from the module's own beginning on a random linear loss.

    A parameter behind one that starts at zero gets its first gradient a step later. One whose every value
    gives the same output (a key bias under a softmax) is told, not blamed.
    """
    module = subject.module(train=True)
    held = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not held:
        return Verdict("gradients", None, reason="it has no parameters that train")
    begun = {name: p.detach().clone() for name, p in held.items()}
    optimizer = torch.optim.SGD(held.values(), lr=1.0)
    largest, infinite = dict.fromkeys(held, 0.0), set()
    unused = set(held)
    for step in range(STEPS):
        optimizer.zero_grad()
        y = subject(module, subject.input(seed=step))
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(step)).to(y)
        (y * weights).mean().backward()
        scale = max((p.grad.abs().max().item() for p in held.values() if p.grad is not None), default=0.0)
        for name, p in held.items():
            if p.grad is None:
                continue
            unused.discard(name)
            if not p.grad.isfinite().all():
                infinite.add(name)
            largest[name] = max(largest[name], p.grad.abs().max().item() / (scale or 1.0))
        optimizer.step()
    now = dict(module.named_parameters())
    rebuilt = sorted(name for name in held if now.get(name) is not held[name])
    idle = [n for n in held if n not in unused and largest[n] <= subject.tolerance * 1e-2]
    cancels = [n for n in idle if not _matters(subject, n)]
    dead = sorted(unused - set(rebuilt)) + [n for n in idle if n not in cancels]
    moved = {n for n, p in held.items() if not torch.equal(p, begun[n])}
    still = sorted(n for n in held if n not in moved and n not in {*dead, *cancels, *rebuilt})
    reasons = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (
            ("forward replaces the parameter, so that the optimizer trains another", rebuilt),
            ("no gradient", dead),
            ("a gradient that is not finite", infinite),
            ("a gradient, but no change", still),
        )
        if names
    ]
    numbers = {
        "parameters": len(held),
        "rebuilt": rebuilt,
        "without_gradient": dead,
        "not_finite": sorted(infinite),
        "cancel_in_the_output": sorted(cancels),
    }
    told = f"{', '.join(sorted(cancels))} cancels in the output" if cancels else ""
    return Verdict("gradients", not reasons, numbers, "; ".join(reasons) or told)


def _matters(subject: Subject, name: str) -> bool:
    """Whether another value of a parameter gives another output."""
    module, x = subject.module(jitter=0.1), subject.input()
    before = subject.value(module, x)
    generator = torch.Generator().manual_seed(9)
    parameter: Tensor | nn.Parameter = module.get_parameter(name)
    parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter)
    try:
        return distance(subject.value(module, x), before) > subject.tolerance
    except Refused:
        return True

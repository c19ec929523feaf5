"""One comparison: what is measured and what it is measured against, checked before it is timed.

Every form is first compared with float64 on the same, already rounded inputs; one that is off by more than
its budget gets no speed.
"""

import copy
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ceilings import Ceilings, share
from .measure import free_memory, interleaved, peak_memory, spread, synchronize

__all__ = ["PASSES", "TOLERANCES", "Case", "Form", "compiler_refusal", "measured", "module_form"]

PASSES = ("forward", "forward+backward", "train")
# Of outputs and of gradients, relative to the largest entry: (always granted, never granted). In between,
# MULTIPLE times the yardstick's own error in the same dtype. Networks with batch norm reach 0.11 and 0.08 in
# their gradients when all of them is kept in bfloat16 or float16.
OPERATOR = {"float32": (5e-6, 1e-3), "float16": (2e-3, 8e-3), "bfloat16": (1.6e-2, 6.4e-2)}
NETWORK = {"float32": (5e-5, 1e-3), "float16": (8e-3, 3.2e-2), "bfloat16": (6.4e-2, 0.13)}
TOLERANCES = {
    "operator": (OPERATOR, OPERATOR),
    "network": (NETWORK, {"float32": (5e-5, 1e-3), "float16": (0.16, 0.3), "bfloat16": (0.2, 0.4)}),
}
MULTIPLE = 4.0
# Seconds a call: what is slower is not compared with.
TOO_SLOW = 10.0

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """One way to compute something.

    Args:
        call: the output as a function of the leaves.
        leaves: what it reads and what its gradients go to.
        truth: what `call` must equal, called with the leaves in float64; None is `call`, or `module` in
            float64.
        flops: of the forward pass, two for each multiply-add.
        module: whose parameters the leaves behind the first are; their gradients are judged together,
            because the true gradient of one of them may be zero.
        scratch: bytes that `truth` needs. Where memory does not hold them, `call` in float64 is the truth.
    """

    call: Callable[..., Tensor]
    leaves: Leaves
    truth: Callable[..., Tensor] | None
    flops: int
    module: nn.Module | None = None
    scratch: int = 0


@dataclass(frozen=True)
class Case:
    """A row: what tells it from others, and its forms, the first of which is measured against the others."""

    about: dict[str, Any]
    forms: Callable[[], dict[str, Form]]
    yardstick: str  # the form whose own error is the measure of what may be expected
    tolerance: str = "network"


def module_form(module: nn.Module, x: Tensor, flops: int) -> Form:
    """The module as a form, in evaluation; its truth is itself in float64."""
    leaves = (x.requires_grad_(), *module.eval().parameters())
    return Form(lambda x, *_: module(x), leaves, None, flops, module)


def measured(
    case: Case,
    passes: Sequence[str],
    ceilings: Ceilings,
    *,
    seconds: float = 1.0,
    device: str = "cpu",
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A row for each pass.

    "forms" holds for each form {"median_ms", "low_ms", "high_ms", "samples", "peak_mb", "gflops",
    "mb_at_least", "share", "bound", "error"}; "speedup" the ratio of the rounds to each other form. What is
    missing there is told in "notes". "wrong": the measured form itself is, and the row has no "forms".
    """
    forms = case.forms()
    subject = next(iter(forms))
    notes: list[str] = []
    for name, form in list(forms.items()):
        if form.scratch > free_memory(device) / 2:
            needs = f"{form.scratch / 2**30:.0f} GiB"
            if form.call is form.truth:
                del forms[name]
                notes.append(f"{name} was left out: it needs {needs}")
            else:
                forms[name] = replace(form, truth=None)
                notes.append(f"{name} was checked against its own float64: the published form needs {needs}")
    if compiled:
        forms |= {f"{name}, compiled": _compiled(form) for name, form in forms.items()}
    backward = any(name != "forward" for name in passes)
    checks: dict[str, Check] = {}
    for name, form in forms.items():
        try:
            checks[name] = _check(form, backward, device, first=name.endswith(", compiled"))
        except Exception as error:
            if name == subject or not name.endswith(", compiled"):
                raise
            words = str(error).strip().splitlines() or [type(error).__name__]
            notes.append(f"{name} was left out: torch.compile says {words[0]}")
    outputs, gradients = (by_dtype[case.about["dtype"]] for by_dtype in TOLERANCES[case.tolerance])
    rows = []
    for name in passes:

        def excess(errors: Sequence[float], measure: Sequence[float] = (), name: str = name) -> Excess:
            judged = [(errors[0], *outputs, *measure[:1])]
            if name != "forward":
                judged.append((max(errors[1:]), *gradients, *([max(measure[1:])] if measure else [])))
            return max(_excess(*one) for one in judged)

        yardstick = checks.get(case.yardstick)
        worst = excess(checks[subject].errors, yardstick.errors if yardstick else ())
        row = {**case.about, "pass": name, "subject": subject, "error": worst.error, "budget": worst.budget}
        row |= {"wrong": worst.times > 1, "notes": list(notes)}
        rows.append(row)
        if row["wrong"]:
            row["notes"].append(f"{subject} is wrong: off by {worst.error:.1e}, budget {worst.budget:.1e}")
            continue
        kept = {subject: forms[subject]}
        for other, check in checks.items():
            if other == subject:
                continue
            if (off := excess(check.errors, [math.inf] * len(check.errors))).times > 1:
                row["notes"].append(f"{other} was left out: off by {off.error:.1e} in this dtype")
            elif check.seconds > TOO_SLOW:
                row["notes"].append(f"{other} was left out: {check.seconds:.0f} s a call")
            else:
                kept[other] = forms[other]
        row |= _timed(kept, name, checks, ceilings, seconds, device)
    del forms
    gc.collect()
    if compiled:
        torch.compiler.reset()  # it recompiles a function so many times only
    return rows


class Excess(NamedTuple):
    """How many times its budget an error is."""

    times: float
    error: float
    budget: float


def _excess(error: float, least: float, most: float, measure: float = 0.0) -> Excess:
    budget = max(least, min(most, MULTIPLE * measure))
    times = error / budget if budget else math.inf
    return Excess(times if error == error else math.inf, error, budget)


@dataclass(frozen=True)
class Check:
    """The errors of the output and of each gradient, what one call took, and the bytes of the output."""

    errors: list[float]
    seconds: float
    moved: int


def _check(form: Form, backward: bool, device: str, first: bool = False) -> Check:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = form.call(*form.leaves)
    weight = torch.randn(out.shape, generator=generator).to(out)
    del out
    if first:  # compiles
        _results(form.call, form.leaves, weight, backward, form.module is not None)
    synchronize(device)
    start = time.perf_counter()
    got = _results(form.call, form.leaves, weight, backward, form.module is not None)
    synchronize(device)
    took = time.perf_counter() - start
    truth = _results(*_exact(form), weight.double(), backward, form.module is not None)
    return Check(_errors(got, truth), took, got[0].nbytes)


def _exact(form: Form) -> tuple[Callable[..., Tensor], Leaves]:
    """The truth and its leaves, in float64."""
    x, *parameters = (t.detach().double().requires_grad_() for t in form.leaves)
    if form.module is None:
        return form.truth or form.call, (x, *parameters)
    wide = copy.deepcopy(form.module).double()
    return lambda x, *_: wide(x), (x, *wide.parameters())


def _results(
    call: Callable[..., Tensor], leaves: Leaves, weight: Tensor, backward: bool, joint: bool
) -> list[Tensor]:
    """The output and, if asked for, the gradients of its product with `weight`."""
    if not backward:
        with torch.no_grad():
            return [call(*leaves)]
    out = call(*leaves)
    found = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    if joint:
        gradients = [gradients[0], torch.cat([g.flatten() for g in gradients[1:]])]
    return [out.detach(), *gradients]


def _errors(got: Iterable[Tensor], truth: Iterable[Tensor]) -> list[float]:
    """The largest difference of each result over the largest true entry; inf where one is not finite."""
    return [
        (g.double() - t).abs().max().item() / (t.abs().max().item() or 1.0)
        if g.isfinite().all()
        else math.inf
        for g, t in zip(got, truth, strict=True)
    ]


def _timed(
    forms: dict[str, Form],
    name: str,
    checks: dict[str, Check],
    ceilings: Ceilings,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    calls = {form_name: _call(form, name) for form_name, form in forms.items()}
    samples = interleaved({**calls, **ceilings.calls}, seconds=seconds, device=device)
    rates = ceilings.rates({key: spread(samples[key])["median"] for key in ceilings.calls})
    found = {}
    for form_name, call in calls.items():
        form, times = forms[form_name], spread(samples[form_name])
        moved, flops = work(form, name, checks[form_name].moved)
        found[form_name] = {
            **{f"{key}_ms": value * 1e3 for key, value in times.items()},
            "samples": len(samples[form_name]),
            "peak_mb": peak_memory(call, device) / 1e6,
            "gflops": flops / 1e9,
            "mb_at_least": moved / 1e6,
            **share(moved, flops, times["median"], rates),
            "error": max(checks[form_name].errors[: 1 if name == "forward" else None]),
        }
    subject, *others = calls
    # Of every round, so that the load of the machine cancels.
    speedup = {
        other: spread([a / b for a, b in zip(samples[other], samples[subject], strict=True)])
        for other in others
    }
    ceiling = {"copy_gb_per_s": rates["copy"] / 1e9, "matmul_gflop_per_s": rates["matmul"] / 1e9}
    return {"forms": found, "speedup": speedup, "ceilings": ceiling}


def work(form: Form, name: str, out: int) -> tuple[int, int]:
    """(bytes moved at least, FLOPs) of a pass.

    Bytes: inputs, parameters and output once; with the backward pass their gradients too; in training also
    AdamW's two moments, read and written, and the new parameters. FLOPs: the backward pass is two products
    for each one of the forward pass.
    """
    moved, flops = sum(t.nbytes for t in form.leaves) + out, form.flops
    if name != "forward":
        moved, flops = 2 * moved, 3 * flops
    if name == "train":
        moved += 5 * sum(t.nbytes for t in form.leaves[1:])
    return moved, flops


def _call(form: Form, name: str) -> Callable[[], object]:
    if form.module is not None:
        form.module.train(name == "train")
    if name == "forward":
        return torch.no_grad()(lambda: form.call(*form.leaves))
    if name == "forward+backward":
        weight = torch.ones_like(form.call(*form.leaves))
        return lambda: torch.autograd.grad(form.call(*form.leaves), form.leaves, weight, allow_unused=True)
    x, *parameters = form.leaves
    # Without a step, so that all samples see the same weights; the work is the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> None:
        form.call(x.detach(), *parameters).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _compiled(form: Form) -> Form:
    return replace(form, call=torch.compile(form.call, dynamic=False))


def compiler_refusal(device: str) -> str | None:
    """Why torch.compile does not work on this device, in one line; None where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return words[0]
    return None

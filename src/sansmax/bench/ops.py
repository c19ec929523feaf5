"""python -m sansmax.bench.ops --out FILE.json: every operator against its published form and against SDPA.

B = 1, 6 heads of 64 (384 channels), float32; forward, and forward with backward. The forms of an operator are
timed in turn within one run. Before that, outputs and gradients are compared with the published form in
float64; where `fused` is off by more than its budget, no speed is given.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sansmax

from . import _published as published
from ._record import recorder
from .measure import interleaved, peak_memory, spread

__all__ = ["CASES", "Case", "compare", "main"]

HEADS, DIM = 6, 64
CHANNELS = HEADS * DIM
LANDMARKS, MEMORY, WINDOW, KERNEL = 49, 64, 32, 11
# Relative to the largest entry: a floor, or a multiple of the published form's own error in float32.
FLOOR, MULTIPLE = 5e-6, 4.0
TOO_SLOW = 10.0

Leaves = tuple[Tensor, ...]
Form = Callable[..., Tensor]


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H D) -> q, k, v (B, H, N, D), strided views as a layer makes them."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def channels(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 C) -> q, k, v (B, T, C), views."""
    q, k, v = qkv.chunk(3, -1)
    return q, k, v


def grid(tokens: int) -> tuple[int, int]:
    """The most nearly square grid."""
    rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
    return rows, tokens // rows


@dataclass(frozen=True)
class Case:
    """One operator: the tensors that its gradients go to, and its two forms as functions of them."""

    leaves: Callable[[int, Callable[..., Tensor]], Leaves]  # tokens, randn
    fused: Form
    published: Form


def _qkv(tokens: int, randn: Callable[..., Tensor]) -> Leaves:
    return (randn(1, tokens, 3 * CHANNELS),)


CASES = {
    "softmax": Case(
        _qkv,
        lambda qkv: sansmax.softmax(*heads(qkv), backend="fused"),
        lambda qkv: published.published_softmax(*heads(qkv)),
    ),
    "sima": Case(
        _qkv,
        lambda qkv: sansmax.sima(*heads(qkv), backend="fused"),
        lambda qkv: published.published_sima(*heads(qkv)),
    ),
    "xnorm": Case(
        lambda n, randn: (*_qkv(n, randn), 1 + 0.1 * randn(HEADS)),
        lambda qkv, gamma: sansmax.xnorm(*heads(qkv), gamma, backend="fused"),
        lambda qkv, gamma: published.published_xnorm(*heads(qkv), gamma),
    ),
    "soft": Case(
        lambda n, randn: (
            randn(1, HEADS, n, DIM) * DIM**-0.25,
            randn(1, HEADS, n, DIM),
            F.gelu(randn(1, HEADS, LANDMARKS, DIM)),
        ),
        lambda q, v, landmarks: sansmax.soft(q, v, landmarks, backend="fused"),
        published.published_soft,
    ),
    "external": Case(
        lambda n, randn: (
            randn(1, n, CHANNELS),
            randn(MEMORY, CHANNELS) * (2 / CHANNELS) ** 0.5,
            randn(MEMORY, CHANNELS) * (2 / CHANNELS) ** 0.5,
        ),
        lambda x, memory_k, memory_v: sansmax.external(x, memory_k, memory_v, backend="fused"),
        published.published_external,
    ),
    "aft_full": Case(
        lambda n, randn: (*_qkv(n, randn), randn(n, n)),
        lambda qkv, w: sansmax.aft_full(*channels(qkv), w, backend="fused"),
        lambda qkv, w: published.published_aft_full(*channels(qkv), w),
    ),
    "aft_local": Case(
        lambda n, randn: (*_qkv(n, randn), randn(n, n)),
        lambda qkv, w: sansmax.aft_local(*channels(qkv), w, WINDOW, backend="fused"),
        lambda qkv, w: published.published_aft_local(*channels(qkv), w, WINDOW),
    ),
    "aft_simple": Case(
        _qkv,
        lambda qkv: sansmax.aft_simple(*channels(qkv), backend="fused"),
        lambda qkv: published.published_aft_simple(*channels(qkv)),
    ),
    "aft_conv": Case(
        lambda n, randn: (
            randn(1, n, CHANNELS),
            randn(1, n, HEADS),
            randn(1, n, CHANNELS),
            randn(HEADS, KERNEL, KERNEL),
        ),
        lambda q, k, v, w: sansmax.aft_conv(q, k, v, w, grid=grid(q.shape[1]), backend="fused"),
        lambda q, k, v, w: published.published_aft_conv(q, k, v, w, grid(q.shape[1])),
    ),
}


def compare(
    op: str, tokens: int, *, seconds: float = 1.0, device: str = "cpu", cases: dict[str, Case] | None = None
) -> list[dict[str, Any]]:
    """Two rows, "forward" and "forward+backward", of one operator at one number of tokens.

    Each holds the error, its budget and, for "fused", "published" and "sdpa", {"median_ms", "low_ms",
    "high_ms", "samples", "peak_mb"}; "speedup_published" and "speedup_sdpa" are ratios of medians. Speeds of
    a wrong result and of a published form that takes longer than 10 s are missing, and "note" says why.
    """
    case = (CASES if cases is None else cases)[op]
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = tuple(t.to(device).requires_grad_() for t in case.leaves(tokens, randn))
    leaves = tuple(t.detach().float().requires_grad_() for t in exact)
    qkv = _qkv(tokens, randn)[0].float().to(device).requires_grad_()
    with torch.no_grad():
        weight = randn(*case.published(*exact).shape).to(device)  # what the gradients are gradients of
    forms = {
        "fused": (case.fused, leaves),
        "published": (case.published, leaves),
        "sdpa": (lambda x: F.scaled_dot_product_attention(*heads(x)), (qkv,)),
    }
    truth = _results(case.published, exact, weight)
    start = time.perf_counter()
    error = _error(_results(case.published, leaves, weight.float()), truth)
    slow = time.perf_counter() - start
    rows = []
    got = _error(_results(case.fused, leaves, weight.float()), truth)
    for name, part in (("forward", slice(0, 1)), ("forward+backward", slice(None))):
        budget = max(FLOOR, MULTIPLE * max(error[part]))
        row = {"op": op, "tokens": tokens, "pass": name, "error": max(got[part]), "budget": budget}
        row["published_error"] = max(error[part])
        rows.append(row)
        if not row["error"] <= budget:
            row["note"] = f"fused is wrong: off by {row['error']:.1e}, budget {budget:.1e}"
            continue
        timed = dict(forms)
        if slow > TOO_SLOW:
            del timed["published"]
            row["note"] = f"the published form was left out: {slow:.0f} s a call"
        row |= _timed(timed, backward=name != "forward", seconds=seconds, device=device)
        for other in ("published", "sdpa"):
            if other in row:
                row[f"speedup_{other}"] = row[other]["median_ms"] / row["fused"]["median_ms"]
    return rows


def _results(form: Form, leaves: Leaves, weight: Tensor) -> Leaves:
    """The output and the gradients of its product with `weight`."""
    out = form(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, weight.expand_as(out))


def _error(got: Leaves, truth: Leaves) -> list[float]:
    """The largest difference of each result over the largest true entry; inf where one is not finite."""
    return [
        (g.double() - t).abs().max().item() / (t.abs().max().item() or 1.0)
        if g.isfinite().all()
        else math.inf
        for g, t in zip(got, truth, strict=True)
    ]


def _timed(
    forms: dict[str, tuple[Form, Leaves]], *, backward: bool, seconds: float, device: str
) -> dict[str, Any]:
    calls = {name: _call(form, leaves, backward) for name, (form, leaves) in forms.items()}
    samples = interleaved(calls, seconds=seconds, device=device)
    found = {}
    for name, call in calls.items():
        milliseconds = {f"{key}_ms": value for key, value in spread(samples[name], 1e3).items()}
        found[name] = {
            **milliseconds,
            "samples": len(samples[name]),
            "peak_mb": peak_memory(call, device) / 1e6,
        }
    return found


def _call(form: Form, leaves: Leaves, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: form(*leaves))
    weight = torch.ones_like(form(*leaves))
    return lambda: torch.autograd.grad(form(*leaves), leaves, weight)


def main(
    out: Path,
    ops: tuple[str, ...] = tuple(CASES),
    tokens: tuple[int, ...] = (196, 1024, 4096),
    seconds: float = 1.0,
    device: str = "cpu",
) -> int:
    """Times every operator against its published form and against F.scaled_dot_product_attention.

    Args:
        out: the JSON file to write.
        ops: which operators.
        tokens: at which numbers of tokens.
        seconds: time for one operator, number of tokens and pass; five samples of each form at least.
        device: "cpu" or "cuda".
    """
    from rich.console import Console

    console = Console()
    rows: list[dict[str, Any]] = []
    save = recorder(
        out,
        "sansmax.bench.ops",
        rows,
        batch=1,
        heads=HEADS,
        dim=DIM,
        channels=CHANNELS,
        dtype="float32",
        landmarks=LANDMARKS,
        memory=MEMORY,
        window=WINDOW,
        kernel=KERNEL,
        device=device,
    )
    for n in tokens:
        for op in ops:
            console.print(f"{op}, {n} tokens", style="dim")
            rows += compare(op, n, seconds=seconds, device=device)
            save()
    console.print(_table(rows))
    for row in rows:
        if "note" in row:
            console.print(f"{row['op']}, {row['tokens']} tokens, {row['pass']}: {row['note']}")
    return int(any("fused" not in row for row in rows))


def _table(rows: list[dict[str, Any]]):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = (
        "x: times faster than the published form and than SDPA; spread: between the quartiles, of the median"
    )
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, caption=caption, caption_justify="left"
    )
    for title in ("tokens", "operator", "pass"):
        table.add_column(title, no_wrap=True)
    for title in ("fused ms", "spread", "x publ.", "x SDPA", "MB", "publ. MB", "SDPA MB"):
        table.add_column(title, justify="right")
    for row in rows:
        cells = [str(row["tokens"]), row["op"], "fwd" if row["pass"] == "forward" else "fwd+bwd"]
        if "fused" not in row:
            table.add_row(*cells, "wrong")
            continue
        fused = row["fused"]
        spread = f"{(fused['high_ms'] - fused['low_ms']) / fused['median_ms']:.0%}"
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("speedup_published", "speedup_sdpa")]
        memory = [
            f"{row[form]['peak_mb']:.1f}" if form in row else "-" for form in ("fused", "published", "sdpa")
        ]
        table.add_row(*cells, f"{fused['median_ms']:.2f}", spread, *ratios, *memory)
    return table


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main))

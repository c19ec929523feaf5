"""The choice of implementation, in plain Python, with its reason in words.

`reference` is the literal equation, `fused` the reordered algebra in plain PyTorch, `triton` a GPU kernel.
A backend that is asked for by name obeys or raises with the reason; `auto` never tries and catches.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

BACKENDS = ("auto", "reference", "fused", "triton")
Limits = tuple[tuple[str, int, int], ...]
_INSTALLED = importlib.util.find_spec("triton") is not None
_HERE = Path(__file__).parent
_WITH_KERNEL = frozenset(
    ".".join(kernel.parent.relative_to(_HERE).parts) for kernel in _HERE.rglob("triton.py")
)


def choose(
    op: str,
    backend: str,
    x: torch.Tensor,
    limits: Limits = (),
    *,
    unserved: str | None = None,
    explain: bool = False,
) -> tuple[str, str]:
    """Which implementation of `op` serves `x`, and why: ("fused", "cpu tensors have no kernel").

    Args:
        op: the module path below sansmax.ops ("sima", "aft.full").
        backend: "auto" follows the environment variable SANSMAX_BACKEND where that is set.
        limits: (what, size, the largest that the kernel serves) for each size that it does not take freely.
        unserved: why the kernel does not serve what else is asked for; None where it does.
        explain: prints the answer too.
    """
    name, reason = _choose(op, backend, x, limits, unserved)
    if explain:
        print(f"sansmax.{op.replace('.', '_')}: {name}, because {reason}")
    return name, reason


def _choose(op: str, backend: str, x: torch.Tensor, limits: Limits, unserved: str | None) -> tuple[str, str]:
    asked = backend
    if backend == "auto":
        backend = os.environ.get("SANSMAX_BACKEND", "auto")
        asked = f"SANSMAX_BACKEND={backend}"
    if backend not in BACKENDS:
        raise ValueError(
            f"{op}: unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}; use 'auto' if unsure"
        )
    if backend in ("reference", "fused"):
        return backend, f"asked for by name ({asked})"
    refusal = _triton_refusal(op, x, limits, backend == "triton") or unserved
    if refusal is None:
        return "triton", f"{x.device.type} tensors of {x.dtype} have a kernel"
    if backend == "triton":
        raise ValueError(f"{op}: backend 'triton' cannot run: {refusal}; use backend='fused' or 'auto'")
    return "fused", refusal


def _triton_refusal(op: str, x: torch.Tensor, limits: Limits, asked: bool) -> str | None:
    if op not in _WITH_KERNEL:
        return f"no triton kernel is written for {op}"
    device = x.device.type
    if device != "cuda" and not (asked and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"{device} tensors have no kernel"
    if not _INSTALLED:
        return "triton is not installed"
    if x.dtype == torch.float64:
        return "float64 has no kernel"
    # torch.compile traces neither question, and makes no such graph.
    if not torch.compiler.is_compiling() and (
        is_functorch_wrapped_tensor(x) or unpack_dual(x).tangent is not None
    ):
        return "torch.func and forward-mode gradients have no kernel"
    for what, size, largest in limits:
        if size > largest:
            return f"{what} {size} is above {largest}, the most that the kernel serves"
    return None


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A float32 island: autocast off for the device of `x` (a no-op where it is off, which saves 5 us)."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()

"""The choice of implementation, in plain Python, with its reason in words.

`reference` is the literal equation, `fused` the reordered algebra in plain PyTorch, `triton` a GPU kernel.
A backend that is asked for by name obeys or raises with the reason; `auto` never tries and catches.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

BACKENDS = ("auto", "reference", "fused", "triton")
_HERE = Path(__file__).parent
_WITH_KERNEL = frozenset(
    ".".join(kernel.parent.relative_to(_HERE).parts) for kernel in _HERE.rglob("triton.py")
)


def choose(op: str, backend: str, x: torch.Tensor) -> tuple[str, str]:
    """Which implementation of `op` serves `x`, and why: ("fused", "cpu tensors have no kernel").

    `op` is the module path below sansmax.ops ("sima", "aft.full"). `backend="auto"` follows the environment
    variable SANSMAX_BACKEND where that is set.
    """
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
    refusal = _triton_refusal(op, x)
    if refusal is None:
        return "triton", f"{x.device.type} tensors of {x.dtype} have a kernel"
    if backend == "triton":
        raise ValueError(f"{op}: backend 'triton' cannot run: {refusal}; use backend='fused' or 'auto'")
    return "fused", refusal


def _triton_refusal(op: str, x: torch.Tensor) -> str | None:
    if op not in _WITH_KERNEL:
        return f"no triton kernel is written for {op}"
    if x.device.type != "cuda":
        return f"{x.device.type} tensors have no kernel"
    if x.dtype == torch.float64:
        return "float64 has no kernel"
    return None


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A float32 island: autocast off for the device of `x` (a no-op where it is off, which saves 5 us)."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()

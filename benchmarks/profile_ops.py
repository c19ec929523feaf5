"""Where the time of an operator goes: the share of each function of PyTorch that it calls.

python benchmarks/profile_ops.py sima --tokens 4096 --backward
"""

from typing import Annotated

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from sansmax.bench.ops import operator_cases


def main(
    name: Annotated[str, tyro.conf.Positional],
    tokens: int = 1024,
    batch: int = 1,
    heads: int = 6,
    dim: int = 64,
    backward: bool = False,
    causal: bool = False,
    form: str = "sansmax",
    calls: int = 30,
    rows: int = 8,
) -> None:
    """Prints milliseconds a call and shares of one form ("sansmax", "published" or "sdpa") in float32."""
    sizes = {"tokens": (tokens,), "batch": (batch,), "heads": (heads,), "dim": (dim,), "backend": ("fused",)}
    (case,) = operator_cases((name,), **sizes, dtype=("float32",), device="cpu", causal=causal)
    chosen = case.forms()[form]

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = chosen.call(*chosen.leaves)
            if backward:
                torch.autograd.grad(out, chosen.leaves, torch.ones_like(out))

    for _ in range(5):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            call()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{name}, {tokens} tokens: {total / calls / 1e3:.2f} ms a call, the profiler's own time included")
    for event in events[:rows]:
        milliseconds = event.self_cpu_time_total / calls / 1e3
        print(f"{event.key:30s} {event.self_cpu_time_total / total:4.0%} {milliseconds:8.3f} ms")


if __name__ == "__main__":
    tyro.cli(main)

"""Causal decoding: milliseconds for one token behind 100, 10,000 and 100,000 others, with the streaming
state.

    python benchmarks/decode.py --out results/decode-cpu.json

The positions of a mechanism are timed in turn within one run. The state is made by as many steps. Softmax
reads its cache of keys and values; its time per token grows with the position.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

import sansmax
from sansmax.bench import measure
from sansmax.train.checkpoint import write_json

Step = Callable[[Any], Any]


def steps(channels: int, heads: int, window: int, kernel: int, longest: int, batch: int) -> dict[str, Any]:
    """name -> (state before the first token, state -> the state behind one more token)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = randn(3, batch, channels).unbind(0)
    of_heads = [t.unflatten(-1, (heads, -1)) for t in (q, k, v)]
    factors = randn(longest + 1, 8), randn(longest + 1, 8)
    keys, taps = randn(batch, heads), randn(heads, kernel)
    width = channels // heads
    return {
        "aft_simple": (
            sansmax.aft_simple_init_state(batch, channels),
            lambda state: sansmax.aft_simple_step(q, k, v, state)[1],
        ),
        f"aft_local, window {window}": (
            sansmax.aft_local_init_state(batch, channels),
            lambda state: sansmax.aft_local_step(q, k, v, factors, window, state)[1],
        ),
        f"aft_conv, kernel {kernel}": (
            sansmax.aft_conv_init_state(batch, channels, heads, kernel),
            lambda state: sansmax.aft_conv_step(q, keys, v, taps, state)[1],
        ),
        "sima": (
            sansmax.sima_init_state(batch, heads, width),
            lambda state: sansmax.sima_step(*of_heads, state)[1],
        ),
        "xnorm": (
            sansmax.xnorm_init_state(batch, heads, width),
            lambda state: sansmax.xnorm_step(*of_heads, state=state)[1],
        ),
    }


def main(
    out: str = "decode.json",
    positions: tuple[int, ...] = (100, 10_000, 100_000),
    channels: int = 512,
    heads: int = 8,
    window: int = 32,
    kernel: int = 11,
    batch: int = 1,
    seconds: float = 3.0,
) -> None:
    """Writes a row for each mechanism: position -> milliseconds for a token, median and quartiles."""
    settings = {"channels": channels, "heads": heads, "batch": batch, "seconds": seconds}
    rows: dict[str, Any] = {}
    with torch.inference_mode():
        for name, (state, step) in steps(channels, heads, window, kernel, max(positions), batch).items():
            calls, done = {}, 0
            for position in sorted(positions):
                for _ in range(position - done):
                    state = step(state)
                done = position
                calls[str(position)] = lambda state=state, step=step: step(state)
            rows[name] = timed(name, calls, seconds)
        q = torch.randn(batch, heads, 1, channels // heads)
        calls = {}
        for position in positions:
            cache = torch.randn(2, batch, heads, position, channels // heads)
            calls[str(position)] = lambda c=cache: F.scaled_dot_product_attention(q, c[0], c[1])
        rows["softmax"] = timed("softmax, with a cache", calls, seconds)
    found = {"rows": rows, "settings": settings, "commit": measure.commit(), "machine": measure.machine()}
    write_json(Path(out), found | {"versions": measure.versions()})


def timed(name: str, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    samples = measure.interleaved(calls, seconds=seconds)
    found = {at: measure.spread(taken, 1e3) for at, taken in samples.items()}
    print(name, {at: f"{row['median'] * 1e3:.1f} us" for at, row in found.items()}, flush=True)
    return found


if __name__ == "__main__":
    tyro.cli(main)

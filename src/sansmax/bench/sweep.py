"""Latency and memory of one layer against the number of tokens, and where it overtakes softmax."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import layers
from .measure import free_memory, interleaved, peak_memory, spread

__all__ = ["Point", "crossover", "sweep"]

# {"tokens": int, "latency_ms": float, "memory_mb": float}
Point = dict[str, Any]

# Square grids, each with about twice the tokens of the one before: 64, 121, 256, 529, 1024, ...
SIDES = tuple(round(8 * 2 ** (i / 2)) for i in range(18))
FAST_SECONDS = 0.15


def sweep(
    mechanism: str,
    *,
    dim: int = 96,
    num_heads: int = 3,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    seconds: float = 8.0,
    stop_seconds: float = 2.0,
    max_tokens: int | None = None,
) -> list[Point]:
    """Inference of one sequence through the layer `mechanism`, its projections included, on growing grids.

    Stops before a call is expected to take longer than `stop_seconds`, before `seconds` are used up, before
    half of the free memory would be needed, and behind `max_tokens`. Run softmax first, and give its last
    count to the others as `max_tokens`.

    Args:
        options: keywords for the layer's constructor.

    Returns:
        [{"tokens", "latency_ms" (median), "memory_mb" (10^6 bytes beyond input and weights)}] by tokens.
    """
    end = time.perf_counter() + seconds
    points: list[Point] = []
    held = 0
    for side in SIDES:
        tokens = side * side
        if max_tokens is not None and tokens > max_tokens:
            break
        if points:
            growth = tokens / points[-1]["tokens"]
            expected = points[-1]["latency_ms"] / 1e3 * growth ** _exponent(points)
            calls = 4 if expected > FAST_SECONDS else 8
            late = time.perf_counter() + calls * expected > end
            # Tables and maps grow with the square of the tokens at worst.
            large = held * growth**2 > free_memory(device) / 2
            if expected > stop_seconds or late or large:
                break
        latency, memory, weights = _measure(mechanism, side, dim, num_heads, options or {}, device)
        held = memory + weights
        points.append({"tokens": tokens, "latency_ms": latency * 1e3, "memory_mb": memory / 1e6})
    return points


def _measure(
    mechanism: str,
    side: int,
    dim: int,
    num_heads: int,
    options: Mapping[str, Any],
    device: str | torch.device,
) -> tuple[float, int, int]:
    """Seconds, bytes of one call, bytes of weights."""
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        layer = layers.mechanism(mechanism)(dim, num_heads, device=device, **options).eval()
        layer.set_input((side, side))
        x = torch.randn(1, side * side, dim, device=device)
        layer(x)
        start = time.perf_counter()
        memory = peak_memory(lambda: layer(x), device)
        slow = time.perf_counter() - start > FAST_SECONDS
        samples = interleaved(
            {mechanism: lambda: layer(x)},
            seconds=FAST_SECONDS,
            rounds=2 if slow else 5,
            warmup=0 if slow else 1,
            device=device,
        )
    weights = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    return spread(samples[mechanism])["median"], memory, weights


def _exponent(points: Sequence[Point]) -> float:
    """How the latency grew between the last two points, as a power of the tokens, within 1 and 2."""
    if len(points) < 2:
        return 1.0
    before, last = points[-2:]
    power = math.log(last["latency_ms"] / before["latency_ms"]) / math.log(last["tokens"] / before["tokens"])
    return min(2.0, max(1.0, power))


def crossover(points: Sequence[Point], softmax: Sequence[Point]) -> int | None:
    """The number of tokens from which the mechanism is faster than softmax, up to the last common count.

    Interpolated between two measured counts, linearly in the logarithms. The smallest common count where the
    mechanism is faster throughout; None where it is not faster at the largest one.
    """
    baseline = {point["tokens"]: point["latency_ms"] for point in softmax}
    # log tokens, log of the ratio: positive where softmax is faster
    ratios = [
        (math.log(p["tokens"]), math.log(p["latency_ms"] / baseline[p["tokens"]]))
        for p in sorted(points, key=lambda p: p["tokens"])
        if p["tokens"] in baseline
    ]
    if not ratios or ratios[-1][1] >= 0:
        return None
    slower = [i for i, (_, ratio) in enumerate(ratios) if ratio >= 0]
    if not slower:
        return round(math.exp(ratios[0][0]))
    (x0, y0), (x1, y1) = ratios[slower[-1]], ratios[slower[-1] + 1]
    return round(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))

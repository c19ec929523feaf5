"""What the machine can do at most: a copy and a square matrix product, timed among the calls they judge."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import free_memory, synchronize

__all__ = ["Ceilings", "clock_mhz", "find_ceilings", "share"]

# A copy reads and writes this much; several times the last cache of a core.
COPY_BYTES = 256 * 2**20
# The product grows until a call lasts this long: smaller ones do not fill the processor.
MATMUL_SECONDS = 0.02
LARGEST_SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """Two calls, "copy" and "matmul", and what one call of each does: bytes, and FLOPs."""

    calls: Mapping[str, Callable[[], object]]
    moved: int
    flops: int

    def rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """{"copy": bytes per second, "matmul": FLOPs per second} of the calls' seconds."""
        return {"copy": self.moved / seconds["copy"], "matmul": self.flops / seconds["matmul"]}


def find_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """A copy of a buffer well above the caches, and a square product in `dtype` that fills the processor."""
    cache = 0
    if torch.device(device).type == "cpu":
        cache = _last_cache()
    size = min(max(COPY_BYTES, 4 * cache), free_memory(device) // 8)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    side, left, right = 128, torch.empty(0), torch.empty(0)
    lasted = 0.0
    while lasted < MATMUL_SECONDS and side < LARGEST_SIDE:
        side *= 2
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.mm(left, right)
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        lasted = time.perf_counter() - start
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right)}
    return Ceilings(calls, 2 * size, 2 * side**3)


def _last_cache() -> int:
    """Bytes of the first core's largest cache; 0 where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]])
    return max(sizes, default=0)


def share(moved: int, flops: int, seconds: float, rates: Mapping[str, float]) -> dict[str, float | str]:
    """The least time that bytes and FLOPs could take at the ceilings, over the time taken; what bounds it.

    Exponentials and other work outside of multiply-adds are not counted, so 1 cannot always be reached. Above
    1: the data lie in a cache, or the processor has no fast product in this dtype and another was computed.
    """
    least = {"memory": moved / rates["copy"], "compute": flops / rates["matmul"]}
    bound = max(least, key=lambda name: least[name])
    return {"share": least[bound] / seconds, "bound": bound}


def clock_mhz(device: str) -> float | None:
    """The clock at this moment: of a GPU, or the mean over the cores; None where it is not told."""
    if torch.device(device).type == "cuda":
        try:
            return float(torch.cuda.clock_rate(device))
        except (ImportError, RuntimeError):  # needs nvidia-ml-py
            return None
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)", text, re.MULTILINE)]
    return sum(clocks) / len(clocks) if clocks else None

"""Time and memory of callables, and what a figure must carry: machine, versions, commit."""

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sansmax

from .. import layers

__all__ = [
    "commit",
    "count_flops",
    "find_device",
    "free_memory",
    "interleaved",
    "machine",
    "peak_memory",
    "spread",
    "synchronize",
    "versions",
]

# A sample repeats a short call until it lasts this long; shorter than the second, it is taken behind a call
# that does not count, so that it finds its own data in the caches and not those of the callable before it. A
# sample of SimA at 4096 tokens behind a copy of 256 MB took twice the time.
SAMPLE_SECONDS = 2e-3
WARM_SECONDS = 2e-2
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "torchmetrics",
    "numpy",
    "matplotlib",
    "scikit-learn",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds per call of every callable, sampled in turn so that all see the same load of the machine.

    After `warmup` calls of each, a round takes one sample of each, every second round in reverse order,
    until `rounds` are done and `seconds` have passed in all, or `max_rounds` are done. A sample repeats a
    short call for 2 ms (without warm-up: calls once), behind one that does not count if it takes less than
    20 ms. On a CUDA device the clock is read when it is idle.

    Returns:
        name -> samples in the order in which they were taken, as many for each name.
    """
    if not fns:
        raise ValueError(
            "interleaved: fns must name at least one callable, got none; pass {'name': callable}"
        )
    if not 1 <= rounds <= max_rounds:
        raise ValueError(
            f"interleaved: rounds must lie between 1 and max_rounds={max_rounds}, got {rounds}; use 5 or more"
        )
    repeats, warm = dict.fromkeys(fns, 1), dict.fromkeys(fns, False)
    for name, fn in fns.items():
        for _ in range(warmup):
            took = _seconds_per_call(fn, 1, device)
            repeats[name] = min(100, max(1, round(SAMPLE_SECONDS / took)))
            warm[name] = took < WARM_SECONDS
    samples: dict[str, list[float]] = {name: [] for name in fns}
    order = list(fns)
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= rounds and time.perf_counter() >= end:
            break
        for name in order:
            if warm[name]:
                fns[name]()
            samples[name].append(_seconds_per_call(fns[name], repeats[name], device))
        order.reverse()
    return samples


def _seconds_per_call(fn: Callable[[], object], repeats: int, device: str | torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-9) / repeats


def synchronize(device: str | torch.device) -> None:
    """Waits until a CUDA device is idle."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def find_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is the GPU where PyTorch sees one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device: expected auto, cpu or, where PyTorch sees a GPU, cuda, got {name!r}; leave it out to "
            f"take what is there, or choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    return name


def spread(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """{"median", "low", "high"} of the samples times `scale`; low and high are the quartiles."""
    if len(samples) == 1:
        low = high = samples[0]
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": statistics.median(samples) * scale, "low": low * scale, "high": high * scale}


def peak_memory(fn: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes that PyTorch's allocator held during one call of `fn`, beyond what it held at the start.

    CPU: the running sum of the profiler's memory events, exact for tensors that `fn` makes; the release of
    older ones is not seen, nor is scratch space that MKL or oneDNN take from the system. CUDA:
    torch.cuda.max_memory_allocated. Call `fn` once before if its first call fills caches.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    if device.type != "cpu":
        raise ValueError(
            f"peak_memory: device must be cpu or cuda, got {device}; measure memory on one of these"
        )
    # The profiler's library reads this at its first use; otherwise it writes "profiler_start" and, without a
    # GPU, an error to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profile:
        fn()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can still be allocated; on the CPU within the limit of the container, where one is set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with contextlib.suppress(OSError):  # not Linux
        limits += re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    limits = [int(kilobytes) * 1024 for kilobytes in limits]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or its limit is "max"
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=2 * 2**30)


def machine() -> dict[str, object]:
    """What the figures were taken on: processor, cores, threads, memory in GiB, GPU, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": ", ".join(gpus) or None,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str | None]:
    """sansmax, Python and the packages that the figures depend on; None where one is not installed."""
    found: dict[str, str | None] = {"sansmax": sansmax.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def commit() -> str | None:
    """The git commit of the checkout that this package lies in, with "+dirty" if the package was changed.

    None for an installed package, also where its environment lies inside some other checkout.
    """
    package = Path(__file__).parents[1]
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".")
    return head + "+dirty" if head and changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of model(*inputs) in evaluation, a batch of one: two for each multiply-add.

    Mechanisms tell their own count, which includes what is no matrix product; everything else is counted by
    torch.utils.flop_counter as it runs.
    """
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, layers.Mixer)}
    costs: dict[str, int] = {}

    def note(name: str, mixer: layers.Mixer):
        def hook(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            context = options.get("context")
            costs[name] = mixer.flops(args[0].shape[1], None if context is None else context.shape[1])

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name, module), with_kwargs=True)
        for name, module in mixers.items()
    ]
    training = model.training
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    model.train(training)
    for hook in hooks:
        hook.remove()
    counted = counter.get_flop_counts()
    total = counter.get_total_flops()
    for name, cost in costs.items():
        inside = counted.get(f"{type(model).__name__}.{name}", {})
        total += cost - sum(inside.values())
    return total

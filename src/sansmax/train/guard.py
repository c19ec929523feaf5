"""What may go wrong in a long run: signals, numbers that are not finite, full memory, dead workers."""

import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .recipe import Run

__all__ = [
    "Interrupted",
    "NormBuffers",
    "Signals",
    "fitting_batch",
    "in_words",
    "interrupted",
    "not_finite",
]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, saved its state and left; its text says how to go on."""


def interrupted(name: str, saved: str) -> Interrupted:
    """To be raised after a signal of that name."""
    return Interrupted(f"interrupted by {name}: {saved}")


def not_finite(recipe: Run, count: int, where: str, loss: float, norm: float, saved: str) -> ValueError:
    """To be raised after so many updates in a row whose loss or gradient was not finite."""
    return ValueError(
        f"training: expected finite losses and gradients, got {count} updates in a row without, up to "
        f"update {where} (loss {loss:g}, gradient {norm:g}, lr {recipe.lr():g}, seed {recipe.seed}); begin "
        f"in another folder with a lower --optim.lr or --optim.clip; {saved}"
    )


class Signals:
    """While it is entered, SIGTERM and Ctrl-C only set `name`; a second one acts as always."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's program has the signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])


class NormBuffers:
    """Running statistics of batch norms, kept so that an update with numbers that are not finite leaves no
    trace."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [
            b for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)
        ]
        self._kept = [b.clone() for b in self.tensors]

    def keep(self) -> None:
        """After a good update."""
        if self.tensors:
            torch._foreach_copy_(self._kept, self.tensors)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """After a bad one."""
        if self.tensors:
            torch._foreach_copy_(self.tensors, self._kept)  # pyright: ignore[reportPrivateImportUsage]


def fitting_batch(peak: Callable[[int], float], capacity: float, batch: int) -> int:
    """The largest batch that is expected to fit, from the peak memory measured with two small ones.

    memory(b) = m0 + m1 b is fitted through the two; a tenth of the capacity is left free.

    Args:
        peak: bytes at most in use during forward and backward of so many samples.
        capacity: bytes of the device.
        batch: that did not fit.

    Returns:
        0 where not even one image fits.
    """
    small = max(1, batch // 16)
    large = 2 * small
    try:
        first, second = peak(small), peak(large)
    except torch.OutOfMemoryError:
        return 0
    each = max((second - first) / (large - small), 1.0)
    return max(0, min(batch - 1, int((0.9 * capacity - (first - each * small)) / each)))


@contextmanager
def in_words(saved: Callable[[], str], estimate: Callable[[], int], unit: str = "images") -> Iterator[None]:
    """Full memory and dead workers as one sentence; `saved` says what is kept, `estimate` which batch would
    fit, `unit` what samples are called."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        wanted = found.group(1) if found else "more"
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
        torch.cuda.empty_cache()
        fits = estimate()
        hint = (
            f"a batch of {fits} a process would fit by what two small ones took: raise --accumulate or lower "
            f"--batch-size"
            if fits
            else "lower --batch-size or --img-size, raise --accumulate"
        )
        raise ValueError(
            f"memory: expected a batch that fits on the GPU, got one that asked for {wanted} too much; "
            f"{hint}, or add --checkpointing or --precision bf16; {saved()}"
        ) from None
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ValueError(
                f"compile: expected a network and a machine on which torch.compile works, got "
                f"{words[:160]!r}; leave --compile out; {saved()}"
            ) from None
        if "DataLoader worker" in words:
            raise ValueError(
                f"data.workers: expected processes that decode {unit} to live, got {words[:160]!r}; lower "
                f"--data.workers or free memory (also /dev/shm); {saved()}"
            ) from None
        if "Expected to have finished reduction" in words:
            raise ValueError(
                "parallel: expected a network of which every weight is used, as copies of it must (ddp), got "
                f"one with others; freeze them, or use --parallel fsdp; {saved()}"
            ) from None
        if "can't allocate memory" in words or "not enough memory" in words:
            raise ValueError(
                f"memory: expected a batch that fits into memory, got {words[:160]!r}; lower --batch-size or "
                f"--img-size, or raise --accumulate; {saved()}"
            ) from None
        raise
    except StopIteration:
        raise ValueError(
            f"data: expected {unit} for every update of an epoch, got fewer; check data.root and "
            f"data.num_samples; {saved()}"
        ) from None

"""Tokens of a grid on disk, read and written a rectangle at a time."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..layers._contract import Grid

__all__ = ["Box", "Scratch", "check_space"]


class Box(NamedTuple):
    """A rectangle of tokens."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> Grid:
        return self.bottom - self.top, self.right - self.left

    def grown(self, by: int, grid: Grid) -> "Box":
        """With its neighbours, those that there are."""
        return Box(
            max(self.top - by, 0),
            min(self.bottom + by, grid[0]),
            max(self.left - by, 0),
            min(self.right + by, grid[1]),
        )

    def within(self, other: "Box") -> tuple[slice, slice]:
        """Its rows and columns among those of another around it."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )


def check_space(folder: str | Path | None, needed: int) -> None:
    """Refuses a folder that is none, or whose disk has less than `needed` bytes."""
    where = Path(tempfile.gettempdir() if folder is None else folder).expanduser()
    if not where.is_dir():
        raise ValueError(f"scratch: expected a folder, got {where}; make it, or name another")
    free = shutil.disk_usage(where).free
    if free < needed:
        raise ValueError(
            f"scratch: expected {needed / 1e9:.2f} GB free for the tokens, got {free / 1e9:.2f} GB in "
            f"{where}; name a folder on another disk"
        )


class Scratch:
    """Tokens (rows, columns, C) in a file without a name: the system removes it with the process at latest.

    Read and written, not mapped, so that no page of it counts as memory of the process. Tensors come in the
    dtype and on the device of `weight`.
    """

    def __init__(self, folder: str | Path | None, grid: Grid, dim: int, weight: Tensor) -> None:
        where = None if folder is None else Path(folder).expanduser()
        self.file: Any = tempfile.TemporaryFile(buffering=0, dir=where)  # noqa: SIM115
        self.grid, self.dim, self.weight = grid, dim, weight

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def read(self, box: Box) -> Tensor:
        """(rows, columns, C)."""
        x = torch.empty(*box.shape, self.dim, dtype=self.weight.dtype)
        for row, line in enumerate(x, box.top):
            self._seek(row, box.left)
            view = _bytes(line)
            while view:
                if not (got := self.file.readinto(view)):
                    raise OSError(
                        "scratch: expected the tokens written before, got the end of the file; run again"
                    )
                view = view[got:]
        return x.to(self.weight.device)

    def write(self, box: Box, x: Tensor) -> None:
        """x (rows, columns, C)."""
        for row, line in enumerate(x.to("cpu", self.weight.dtype).contiguous(), box.top):
            self._seek(row, box.left)
            view = _bytes(line)
            while view:
                view = view[self.file.write(view) :]

    def _seek(self, row: int, column: int) -> None:
        self.file.seek((row * self.grid[1] + column) * self.dim * self.weight.element_size())


def _bytes(line: Tensor) -> memoryview:
    numbers: Any = line.view(torch.uint8).numpy()
    return memoryview(numbers).cast("B")

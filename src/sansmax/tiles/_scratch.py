"""Tokens of a grid on disk, read and written a rectangle at a time."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..layers._contract import Grid
from ._trunk import Box, Trunk

__all__ = ["Scratch", "check_space"]


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

    Read and written, not mapped, so that no page of it counts as memory of the process.
    """

    def __init__(self, folder: str | Path | None, grid: Grid, trunk: Trunk) -> None:
        where = None if folder is None else Path(folder).expanduser()
        self.file: Any = tempfile.TemporaryFile(buffering=0, dir=where)  # noqa: SIM115
        self.grid, self.trunk = grid, trunk
        self.bytes = trunk.tokens_bytes((1, 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def read(self, box: Box) -> Tensor:
        """(rows, columns, C) on the device of the network."""
        weight = self.trunk.weight
        x = torch.empty(*box.shape, self.trunk.dim, dtype=weight.dtype)
        for row, line in enumerate(x, box.top):
            self._seek(row, box.left)
            view = _bytes(line)
            while view:
                view = view[self.file.readinto(view) :]
        return x.to(weight.device)

    def write(self, box: Box, x: Tensor) -> None:
        """x (rows, columns, C)."""
        for row, line in enumerate(x.to("cpu", self.trunk.weight.dtype).contiguous(), box.top):
            self._seek(row, box.left)
            view = _bytes(line)
            while view:
                view = view[self.file.write(view) :]

    def _seek(self, row: int, column: int) -> None:
        self.file.seek((row * self.grid[1] + column) * self.bytes)


def _bytes(line: Tensor) -> memoryview:
    numbers: Any = line.view(torch.uint8).numpy()
    return memoryview(numbers).cast("B")

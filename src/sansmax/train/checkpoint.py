"""Files of a run: written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["States", "prepare_folder", "read_json", "refused", "replace_file", "write_json", "write_text"]

PROBE_BYTES = 2**20


def prepare_folder(folder: Path) -> None:
    """Makes the folder and writes a megabyte to it and away again.

    Raises:
        OSError: it cannot be made or written to, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(
            f"out: expected a folder, got a file at {folder}; name another folder with --out"
        ) from None
    except OSError as error:
        raise refused(folder, error) from None
    probe = folder / f".probe-{os.getpid()}"
    try:
        write_text(probe, "\0" * PROBE_BYTES)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Through a synced temporary file beside it: a reader sees the old content or the new one."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` makes a file beside `path`, which is synced and then takes its place.

    Raises:
        OSError: it cannot be written; one sentence says what to do.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = Path(file.name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise refused(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The name of a file lasts through a power cut once its folder is synced."""
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refused(path: Path, error: OSError) -> OSError:
    """The error as a sentence that says what to do."""
    return type(error)(
        f"out: expected to be able to write {path}, got {error.strerror!r}; make room, change its rights or "
        f"name another folder; what was finished is kept"
    )


def write_json(path: Path, value: Any) -> None:
    """As indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content, or None where there is no such file.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(
            f"out: expected JSON in {path}, got something else; remove the file and run again, or name "
            f"another folder with --out"
        ) from None


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given the path, PyTorch makes of a full disk a RuntimeError
        torch.save(state, file)


class States:
    """Resumable states of a run in a folder: `state-<update>.pt`, the last `keep` of them.

    A state is a dictionary of tensors, numbers, text, lists and dictionaries, read back without executing
    anything.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.folder.glob("state-*.pt"))

    def save(self, update: int, state: dict[str, Any]) -> Path:
        """Writes a state whole or not at all, then removes what is older than the last `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"state-{update:09d}.pt"
        replace_file(path, lambda temporary: _save(state, temporary))
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read, or None where there is none; left-overs of killed runs go away.

        Raises:
            ValueError: there are states, but none can be read.
        """
        for left in self.folder.glob(".state-*"):
            left.unlink(missing_ok=True)
        broken = []
        for path in reversed(self.paths()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (
                Exception
            ) as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, OSError and more
                broken.append(f"{path.name} ({' '.join(str(error).split())[:80]})")
        if broken:
            raise ValueError(
                f"resume: expected a readable state in {self.folder}, got {', '.join(broken)}; remove the "
                "folder to begin anew"
            )
        return None

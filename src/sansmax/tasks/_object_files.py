"""Detections of many images as one file, begun again where it was left."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

__all__ = ["Journal"]


class Journal:
    """Entries of images, kept in a hidden file beside `out` until `finish` writes `out` whole.

    Args:
        out: a .json file.
        mark: of the network and of how it looks: what another has kept is begun anew.
    """

    def __init__(self, out: Path, mark: str) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.partial")
        self.done: set[str] = set()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n") or (not whole and json.loads(line) != mark):
                break  # cut off while it was written, or another's
            if whole:
                self.done.add(json.loads(line)["name"])
            whole += len(line)
        self.file.truncate(whole)
        if not whole:
            self._write(mark)

    def add(self, name: str, entries: list[dict[str, Any]] | None, reason: str = "") -> None:
        """What was found in an image, or why it could not be read."""
        self._write({"name": name, "entries": entries, "reason": reason})
        self.done.add(name)

    def finish(self) -> tuple[int, list[dict[str, str]]]:
        """Writes `out`, a list of all entries, and beside it the images that could not be read; gives the
        number of entries and these."""
        skipped: list[dict[str, str]] = []
        count = 0
        self.file.seek(0)
        next(self.file)

        def write(to: Any) -> None:
            nonlocal count
            for line in self.file:
                image = json.loads(line)
                if image["entries"] is None:
                    skipped.append({"path": image["name"], "reason": image["reason"]})
                for entry in image["entries"] or ():
                    to.write(f"{',' if count else '['}\n{json.dumps(entry)}")
                    count += 1
            to.write("\n]\n" if count else "[]\n")

        _replaced(self.out, write)
        listed = json.dumps(skipped, indent=2) + "\n"
        _replaced(self.out.with_suffix(".skipped.json"), lambda to: to.write(listed))
        self.path.unlink()
        return count, skipped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def _write(self, value: Any) -> None:
        self.file.write(json.dumps(value).encode() + b"\n")
        self.file.flush()


def _replaced(path: Path, write: Callable[[Any], Any]) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Masks as files: indexed PNGs that tell who made them."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ._data.folder import files_of
from ._mask_pictures import palette

__all__ = ["mark_of", "names_of", "write_mask"]

MARK = "sansmax"  # the PNG's text that holds the mark


def names_of(source: Path, out: Path) -> dict[str, Path]:
    """The images of `source` by the name of their mask: that of the image with .png, or the whole of it and
    .png where two would be the same.

    Raises:
        OSError: there is none.
    """
    if source.is_file():
        return {f"{source.stem}.png": source}
    if not source.is_dir():
        raise FileNotFoundError(
            f"source: expected an image or a folder, got nothing at {source}; check the path"
        )
    paths = [path for path in files_of(source) if not path.resolve().is_relative_to(out.resolve())]
    if not paths:
        raise FileNotFoundError(f"source: expected images in {source}, got none; check the path")
    found: dict[str, Path] = {}
    for path in paths:
        short = path.relative_to(source)
        name = short.with_suffix(".png").as_posix()
        found[f"{short.as_posix()}.png" if name in found else name] = path
    return found


def mark_of(path: Path) -> str | None:
    """Of a mask that is there; None where nothing is.

    Raises:
        ValueError: there is a file that no network of sansmax has written.
    """
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            mark = image.info.get(MARK)
    except Exception:  # whatever it is, it is not ours
        mark = None
    if mark is None:
        raise ValueError(
            f"out: expected no other files than masks of sansmax, got {path}, which would be overwritten; "
            "name another folder with --out"
        )
    return mark


def write_mask(path: Path, classes: np.ndarray, mark: str) -> None:
    """classes uint8 (height, width), written whole or not at all."""
    image = Image.fromarray(classes).convert("P")
    image.putpalette(palette().tobytes())
    text = PngInfo()
    text.add_text(MARK, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        image.save(temporary, "PNG", pnginfo=text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

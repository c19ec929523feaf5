"""Bytes to learn from: a file, or a folder with one for each split."""

import bz2
import gzip
import lzma
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._recipes.chars import TextData

__all__ = ["Text", "read_text"]

# The splits of enwik8 (Mahoney's 10^8 bytes) in the literature; spec of AFT, section 5.2.
ENWIK8 = {100_000_000: (90_000_000, 5_000_000, 5_000_000)}
SPLITS = {"train": ("train",), "val": ("valid", "val", "validation", "dev"), "test": ("test",)}
OPEN = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Text:
    """train and val: uint8 (n,)."""

    title: str
    split: str
    train: Tensor
    val: Tensor


def read_text(data: TextData, tokens: int) -> Text:
    """The bytes of the training and the held-out split.

    Args:
        tokens: of a sequence, for which there must be enough bytes.

    Raises:
        ValueError, OSError: nothing is there, it cannot be read, or it has too few bytes.
    """
    if data.val_split not in ("val", "test"):
        raise ValueError(f"data.val_split: expected val or test, got {data.val_split!r}")
    parts, how = _parts(data)
    train, val = parts["train"][: data.train_bytes], parts[data.val_split][: data.val_bytes]
    for name, part, least in (("train", train, tokens + 2), (data.val_split, val, 2)):
        if len(part) < least:
            raise ValueError(
                f"data.root: expected at least {least} bytes in the split {name}, got {len(part)} in "
                f"{data.root}; give a longer file, or lower tokens"
            )
    title = "Python's standard library" if data.root == "stdlib" else Path(data.root).expanduser().name
    return Text(title, how, *(torch.from_numpy(part.copy()) for part in (train, val)))


def _parts(data: TextData) -> tuple[dict[str, np.ndarray], str]:
    """The bytes of each split, and how they were told apart."""
    path = Path(data.root).expanduser()
    if data.root != "stdlib" and path.is_dir():
        found = {name: _of_folder(path, words) for name, words in SPLITS.items()}
        return found, f"the files of {data.val_split} in {path.name}"
    whole = _stdlib() if data.root == "stdlib" else _unpacked(path)
    total = len(whole)
    if data.splits:
        sizes = data.splits
        if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) > total:
            raise ValueError(
                f"data.splits: expected three sizes of together at most {total} bytes, got "
                f"{' '.join(map(str, sizes))}; lower them, or leave them out"
            )
    else:
        held = total // 20
        sizes = ENWIK8.get(total, (total - 2 * held, held, held))
    ends = np.cumsum((0, *sizes))
    parts = {name: whole[a:b] for name, a, b in zip(SPLITS, ends, ends[1:], strict=False)}
    start = int(ends[1 if data.val_split == "val" else 2])
    return parts, f"bytes {start:,} to {start + len(parts[data.val_split]):,} of {total:,}"


def _of_folder(folder: Path, words: tuple[str, ...]) -> np.ndarray:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.partition(".")[0] in words)
    if len(files) != 1:
        raise FileNotFoundError(
            f"data.root: expected one file {words[0]}.* in {folder}, got {len(files)}; name them train.txt, "
            "valid.txt and test.txt, or give a single file"
        )
    return _unpacked(files[0])


def _unpacked(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"data.root: expected a file or a folder at {path}, got nothing; check the path"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/")]
                if len(names) != 1:
                    raise ValueError(
                        f"data.root: expected one file in {path}, got {len(names)}; unpack it and name one"
                    )
                content = archive.read(names[0])
        elif path.suffix in OPEN:
            with OPEN[path.suffix](path, "rb") as file:
                content = file.read()
        else:
            return np.fromfile(path, np.uint8)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"data.root: expected a {path.suffix} file that can be unpacked at {path}, got "
            f"{' '.join(str(error).split()) or type(error).__name__}; fetch it again"
        ) from None
    return np.frombuffer(content, np.uint8)


def _stdlib() -> np.ndarray:
    """The modules of the standard library that are one file each, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"".join(p.read_bytes() for p in sorted(folder.glob("*.py"))), np.uint8)

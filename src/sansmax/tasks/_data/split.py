"""One split of a set of labelled images with random access: a folder, a tar, a torchvision or a Hugging
Face set."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import folder
from ._decode import to_rgb
from .draws import order
from .settings import Data

__all__ = ["Split", "is_sharded", "open_split"]

HELD_OUT_NAMES = ("validation", "val", "valid", "test", "eval")


@dataclass(frozen=True)
class Split:
    """Labelled images, decoded when they are asked for.

    Attributes:
        title: of the set, in words.
        classes: their names.
        labels: int64 (count,), or None where the reader tells a label only with its image.
        names: what an image is called, by its position.
        read: an image, open, and its label, by its position.
    """

    title: str
    classes: list[str]
    labels: np.ndarray | None
    names: Callable[[int], str]
    read: Callable[[int], tuple[Image.Image, int]]
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Of an image, for people."""
        return self.names(index)

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """Upright RGB, and the class.

        Raises:
            Exception: of any of PIL's kinds, where the image cannot be read.
        """
        image, label = self.read(index)
        with image:
            return to_rgb(image), int(label)

    def subset(self, positions: list[int]) -> "Split":
        """These images alone."""
        return Split(
            self.title,
            self.classes,
            None if self.labels is None else self.labels[positions],
            lambda i: self.names(positions[i]),
            lambda i: self.read(positions[i]),
            len(positions),
        )

    def shuffled(self, count: int) -> "Split":
        """The first `count` of a shuffle that is always the same."""
        return self.subset(order(len(self), 0, 0)[:count].tolist())


def is_sharded(data: Data) -> bool:
    """Whether the data are WebDataset shards: reader wds, shards named in the split, or a folder of .tar
    alone."""
    if data.reader:
        return data.reader.lower().split("/")[0] == "wds"
    if ".tar" in data.split:
        return True
    root = Path(data.root).expanduser()
    return root.is_dir() and ((root / "_info.json").is_file() or any(root.glob("*.tar")))


def open_split(data: Data, split: str, classes: list[str] | None = None) -> Split:
    """The images of a split.

    Args:
        split: data.split, data.val_split, or another name. Where a folder holds no such sub-folder but one
            for
            each class, a fifth of every class, chosen by the hash of the file names, is "validation", and the
            rest "train".
        classes: names in the order of the labels that are wanted; None: the set's own.

    Raises:
        ValueError, OSError: nothing readable is there, or classes are missing; one sentence says what to do.
    """
    prefix = data.reader.lower().partition("/")[0]
    if prefix in ("torch", "hfds"):
        found = _library(data, split)
    elif data.reader:
        raise ValueError(
            f"data.reader: expected torch/<name>, hfds/<name>, wds or none, got {data.reader!r}; leave it "
            "out for a folder or a tar"
        )
    elif Path(data.root).expanduser().suffix == ".tar":
        found = _tar(Path(data.root).expanduser(), split)
    else:
        found = _folder(Path(data.root).expanduser(), split, classes)
    if not len(found):
        raise ValueError(f"data: expected images in {found.title}, got none; check data.root and data.split")
    return found if classes is None or classes == found.classes else _relabelled(found, classes)


def _relabelled(split: Split, classes: list[str]) -> Split:
    """With labels that count in the order of `classes`."""
    if unknown := sorted(set(split.classes) - set(classes)):
        raise ValueError(
            f"data: expected classes that the network knows in {split.title}, got {folder.some(unknown)} "
            f"besides; it knows {folder.some(classes)}"
        )
    moved = np.array([classes.index(name) for name in split.classes])

    def read(index: int) -> tuple[Image.Image, int]:
        image, label = split.read(index)
        return image, int(moved[label])

    labels = None if split.labels is None else moved[split.labels]
    return Split(split.title, classes, labels, split.names, read, split.count)


def _folder(root: Path, split: str, classes: list[str] | None) -> Split:
    if not root.is_dir():
        kind = "a file" if root.is_file() else "nothing"
        raise NotADirectoryError(
            f"data.root: expected an image folder or a .tar, got {kind} at {root}; lay it out as "
            f"{folder.LAYOUT}"
        )
    parts = {path.name.lower(): path for path in folder.folders(root)}
    held_out = split.lower() in HELD_OUT_NAMES
    wanted = HELD_OUT_NAMES if held_out else (split.lower(),)
    source = next((parts[name] for name in (split.lower(), *wanted) if name in parts), None)
    if source is None and not held_out and split.lower() != "train":
        raise ValueError(
            f"data.split: expected a folder of {root}, got {split!r}; it holds {folder.some(list(parts))}"
        )
    whole = source if source is not None and (held_out or _has_held_out(parts)) else None
    base = whole or source or parts.get("train", root)
    names = folder.classes_of(base)
    files = [(path, label) for label, name in enumerate(names) for path in folder.files_of(base / name)]
    labels = np.array([label for _, label in files], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(names))
    if not held_out and (empty := [name for name, count in zip(names, counts, strict=True) if not count]):
        raise ValueError(
            f"data: expected images in every class folder of {base}, got none in {folder.some(empty)}; add "
            "images or remove the folder"
        )
    if whole is None:
        chosen = folder.held_out(
            torch.from_numpy(labels), [path.relative_to(base).as_posix() for path, _ in files]
        )
        positions = (chosen if held_out else ~chosen).nonzero().flatten().tolist()
        files, labels = [files[i] for i in positions], labels[positions]
    return Split(
        f"{root.resolve().name}/{split}",
        names,
        labels,
        lambda i: files[i][0].relative_to(base).as_posix(),
        lambda i: (Image.open(files[i][0]), files[i][1]),
        len(files),
    )


def _has_held_out(parts: dict[str, Path]) -> bool:
    return any(name in parts for name in HELD_OUT_NAMES)


def _tar(path: Path, split: str) -> Split:
    """A .tar of class folders, with or without folders for the splits above them."""
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    if not path.is_file():
        raise FileNotFoundError(f"data.root: expected a .tar, got nothing at {path}; check the path")
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        reader = ReaderImageInTar(str(path), cache_tarinfo=False)
    except Exception as error:
        raise ValueError(
            f"data.root: expected a .tar of class folders with images, got {error} at {path}; check the file"
        ) from None
    names = [reader.class_idx_to_name[i] for i in range(len(reader.class_idx_to_name))]
    folders = [{*str(part).lower().split("/")[:-2]} for part in map(reader.filename, range(len(reader)))]
    held_out = split.lower() in HELD_OUT_NAMES
    wanted = {*HELD_OUT_NAMES} if held_out else {split.lower()}
    positions = [i for i, found in enumerate(folders) if found & wanted]
    whole = Split(
        f"{path.name}/{split}",
        names,
        np.asarray(reader.targets),
        lambda i: str(reader.filename(i)),
        lambda i: _opened(reader[i]),
        len(reader),
    )
    if not positions:
        chosen = folder.held_out(torch.as_tensor(whole.labels), list(map(whole.names, range(len(whole)))))
        positions = (chosen if held_out else ~chosen).nonzero().flatten().tolist()
    return whole.subset(positions)


def _library(data: Data, split: str) -> Split:
    """torch/<name> and hfds/<name> as timm opens them."""
    from timm.data.dataset_factory import create_dataset

    words: dict[str, Any] = {
        "root": str(Path(data.root).expanduser()),
        "split": split,
        "download": data.download,
    }
    if data.reader.lower().startswith("hfds") and data.root in ("", "digits"):
        words["root"] = None
    try:
        found: Any = create_dataset(data.reader, input_img_mode="", **words)
    except ImportError as error:
        raise ValueError(
            f"data.reader: expected what {data.reader} needs to be installed, got {error}; pip install "
            "sansmax[hf]"
        ) from None
    except Exception as error:
        raise ValueError(
            f"data: expected {data.reader} split {split!r} at {data.root}, got {_line(error)}; check "
            "data.root and the split, or add --data.download"
        ) from None
    reader = getattr(found, "reader", None)
    if reader is None:
        labels = getattr(found, "targets", None)
        names = list(getattr(found, "classes", None) or map(str, range(int(max(labels or [0])) + 1)))
        return Split(
            f"{data.reader} {split}",
            names,
            None if labels is None else np.asarray(labels, dtype=np.int64),
            lambda i: f"{split}/{i}",
            lambda i: found[i],
            len(found),
        )
    by_name = reader.class_to_idx
    return Split(
        f"{data.reader} {split}",
        sorted(by_name, key=by_name.get) if by_name else [],
        None,
        lambda i: str(reader.filename(i) or i),
        lambda i: _opened(reader[i]),
        len(reader),
    )


def _opened(entry: tuple[Any, ...]) -> tuple[Image.Image, int]:
    image, label = entry[:2]
    return image if isinstance(image, Image.Image) else Image.open(image), int(label)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

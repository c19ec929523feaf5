"""One split of a set of labelled images with random access: a folder, a tar, a torchvision or a Hugging
Face set."""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from . import folder
from ._decode import to_rgb
from .draws import order
from .settings import Data

__all__ = ["HELD_OUT_NAMES", "Split", "is_sharded", "open_split"]

HELD_OUT_NAMES = ("validation", "val", "valid", "test", "eval")


class Reader(Protocol):
    """Images of one place; it goes to the processes that decode, so it can be pickled and holds nothing
    open."""

    def name(self, index: int) -> str:
        """What an image is called."""
        ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image, opened, and its label."""
        ...


@dataclass(frozen=True)
class Split:
    """Labelled images, decoded when they are asked for.

    Attributes:
        title: of the set, in words.
        classes: their names.
        reader: of all images that are there.
        positions: of the split's images in the reader.
        meaning: which class a label of the reader stands for; None: itself.
    """

    title: str
    classes: list[str]
    reader: Reader
    positions: np.ndarray
    meaning: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        """Of an image, for people."""
        return self.reader.name(int(self.positions[index]))

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """Upright RGB, and the class.

        Raises:
            Exception: of any of PIL's kinds, where the image cannot be read or its class is none.
        """
        image, label = self.reader.read(int(self.positions[index]))
        with image:
            count = len(self.classes if self.meaning is None else self.meaning)
            if not 0 <= label < count:
                raise ValueError(f"class {label} is none of 0 to {count - 1}")
            return to_rgb(image), label if self.meaning is None else int(self.meaning[label])

    def shuffled(self, count: int) -> "Split":
        """The first `count` of a shuffle that is always the same."""
        return replace(self, positions=self.positions[order(len(self), 0, 0)[:count].numpy()])


def is_sharded(data: Data) -> bool:
    """Whether the data are WebDataset shards: reader wds, shards named in the split, or a folder of .tar
    alone."""
    if data.reader:
        return data.reader.lower().split("/")[0] == "wds"
    if ".tar" in data.split:
        return True
    root = Path(data.root).expanduser()
    if not root.is_dir():
        return False
    return (root / "_info.json").is_file() or (any(root.glob("*.tar")) and not folder.folders(root))


def open_split(data: Data, split: str, classes: list[str] | None = None) -> Split:
    """The images of a split.

    Args:
        split: data.split, data.val_split, or another name. Where a folder or a .tar holds no such folder but
            one for each class, a fifth of every class, chosen by the hash of the file names, is
            "validation", and the rest "train".
        classes: names in the order of the labels that are wanted; None: the set's own.

    Raises:
        ValueError, OSError: nothing readable is there, or classes are missing; one sentence says what to do.
    """
    prefix = data.reader.lower().partition("/")[0]
    root = Path(data.root).expanduser()
    if prefix in ("torch", "hfds"):
        found = _library(data, split)
    elif data.reader:
        raise ValueError(
            f"data.reader: expected torch/<name>, hfds/<name>, wds or none, got {data.reader!r}; leave it "
            "out for a folder or a tar"
        )
    elif root.suffix.lower() == ".tar" and not root.is_dir():
        found = _tar(root, data, split)
    else:
        found = _folder(root, data, split)
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
    place = {name: i for i, name in enumerate(classes)}
    return replace(split, classes=classes, meaning=np.array([place[name] for name in split.classes]))


def _base(data: Data, split: str, find: Callable[[str], Any], where: Path, there: Callable[[], Any]) -> Any:
    """What holds a split of a folder or a .tar, None for all of it, and whether the split is all it holds.

    Args:
        find: what holds the split of a name, or None.
        there: names for the refusal.
    """
    held_out = split.lower() in HELD_OUT_NAMES

    def first(name: str) -> Any:
        names = (name.lower(), *(HELD_OUT_NAMES if name.lower() in HELD_OUT_NAMES else ()))
        return next((found for found in map(find, names) if found is not None), None)

    own, other = first(split), first(data.val_split if split == data.split else data.split)
    if own is not None:
        return own, held_out or other is not None
    if not held_out and split.lower() != "train":
        raise ValueError(
            f"data.split: expected a folder of {where}, got {split!r}; it holds {folder.some(there())}"
        )
    return (other if other is not None else first("train")) if held_out else None, False


def _chosen(title: str, split: str, classes: list[str], labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Positions of a split among images that are not divided.

    Raises:
        ValueError: a class has no image left to train with.
    """
    held_out = folder.held_out(torch.from_numpy(labels), names).numpy()
    if split.lower() in HELD_OUT_NAMES:
        return held_out.nonzero()[0]
    _check_classes(title, classes, labels[~held_out])
    return (~held_out).nonzero()[0]


def _check_classes(title: str, classes: list[str], labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if few := [repr(name) for name, count in zip(classes, counts, strict=True) if not count]:
        raise ValueError(
            f"data: expected images of every class to train with in {title}, besides those held out, got "
            f"none of {folder.some(few)}; add images or remove the folder"
        )


@dataclass(frozen=True)
class _Files:
    """Files below a folder; bytes of one width, as a million objects would be copied to every process."""

    root: str
    names: np.ndarray
    labels: np.ndarray

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(os.path.join(self.root, self.name(index))), int(self.labels[index])


def _folder(root: Path, data: Data, split: str) -> Split:
    if not root.is_dir():
        kind = "a file" if root.is_file() else "nothing"
        raise NotADirectoryError(
            f"data.root: expected an image folder or a .tar, got {kind} at {root}; lay it out as "
            f"{folder.LAYOUT}"
        )
    parts = {path.name.lower(): path for path in folder.folders(root)}

    def find(name: str) -> Path | None:
        found = parts.get(name)
        if found and not folder.folders(found) and any(folder.files_of(found)):
            return None  # a class of that name
        return found

    base, whole = _base(data, split, find, root, lambda: list(parts))
    base = base or root
    classes = folder.classes_of(base)
    files = [(path, label) for label, name in enumerate(classes) for path in folder.files_of(base / name)]
    labels = np.array([label for _, label in files], dtype=np.int64)
    title = f"{root.resolve().name}/{split}"
    if whole:
        positions = np.arange(len(files))
        if split.lower() not in HELD_OUT_NAMES and split != data.val_split:
            _check_classes(title, classes, labels)
    else:
        positions = _chosen(title, split, classes, labels, [p.relative_to(base).as_posix() for p, _ in files])
    names = np.array([os.fsencode(path.relative_to(root).as_posix()) for path, _ in files], dtype=np.bytes_)
    return Split(title, classes, _Files(str(root), names, labels), positions)


@dataclass(frozen=True)
class _Tar:
    """Files in a .tar by their places, opened anew for every image: one handle is not to be shared by
    threads or processes."""

    path: str
    names: np.ndarray
    places: np.ndarray  # (count, 2): first byte, bytes
    labels: np.ndarray

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        first, count = self.places[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(first)
            return Image.open(io.BytesIO(file.read(count))), int(self.labels[index])


def _tar(path: Path, data: Data, split: str) -> Split:
    """A .tar of class folders, with or without folders for the splits above them."""
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    if not path.is_file():
        raise FileNotFoundError(f"data.root: expected a .tar, got nothing at {path}; check the path")
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        found = ReaderImageInTar(str(path), cache_tarinfo=False)
    except Exception as error:
        raise ValueError(
            f"data.root: expected a .tar of class folders with images, got {_line(error)} at {path}; check "
            "the file"
        ) from None
    members = [  # without the hidden files that macOS adds
        (member, outer, label)
        for (member, _, outer), label in zip(found.samples, found.targets, strict=True)
        if not os.path.basename(member.name).startswith(".")
    ]
    above = [{*member.name.lower().split("/")[:-2]} for member, _, _ in members]
    labels = np.array([label for _, _, label in members], dtype=np.int64)
    paths = [member.name for member, _, _ in members]
    there = set().union(*above)

    def find(name: str) -> np.ndarray | None:
        return np.array([name in folders for folders in above]).nonzero()[0] if name in there else None

    base, whole = _base(data, split, find, path, lambda: sorted(there))
    base = np.arange(len(members)) if base is None else base
    classes = [found.class_idx_to_name[i] for i in range(len(found.class_idx_to_name))]
    if not whole:
        base = base[_chosen(path.name, split, classes, labels[base], [paths[i] for i in base])]
    places = [
        (member.offset_data + (outer.offset_data if outer else 0), member.size)
        for member, outer, _ in members
    ]
    names = np.array([os.fsencode(name) for name in paths], dtype=np.bytes_)
    reader = _Tar(str(path), names, np.array(places, dtype=np.int64), labels)
    return Split(f"{path.name}/{split}", classes, reader, base)


@dataclass(frozen=True)
class _Torchvision:
    images: Any
    split: str

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images[index]
        return image, int(label)


@dataclass(frozen=True)
class _HuggingFace:
    images: Any  # timm's reader
    split: str

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.images[index]
        with file:
            return Image.open(io.BytesIO(file.read())), int(label)


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
        reader: Any = getattr(found, "reader", None)
        classes = _classes(found) if reader is None else _hugging_face_classes(reader)
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
    images = _Torchvision(found, split) if reader is None else _HuggingFace(reader, split)
    return Split(f"{data.reader} {split}", classes, images, np.arange(len(found)))


def _classes(found: Any) -> list[str]:
    """Names in a torchvision set, which may be tuples of synonyms (ImageNet) or wanting."""
    names = getattr(found, "classes", None) or getattr(found, "all_categories", None)
    if names:
        return [name if isinstance(name, str) else ", ".join(name) for name in names]
    return [str(i) for i in range(int(max(found.targets)) + 1)]


def _hugging_face_classes(reader: Any) -> list[str]:
    by_name = reader.class_to_idx
    if by_name:
        return sorted(by_name, key=by_name.get)
    labels = reader.dataset[reader.label_key]
    return [str(i) for i in range(max(map(int, labels)) + 1)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

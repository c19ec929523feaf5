"""An image folder: one sub-folder a class, with or without `train` and `val` above them."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from . import Images
from ._decode import decode, reason

__all__ = [
    "LAYOUT",
    "classes_of",
    "decode_all",
    "files_of",
    "folders",
    "held_out",
    "image_files",
    "load",
    "some",
]

IMG_SIZE = 64
HELD_OUT = 0.2
VAL_NAMES = ("val", "validation", "valid", "test")
LAYOUT = "FOLDER/<class>/*.jpg or FOLDER/train/<class>/*.jpg with FOLDER/val/<class>/*.jpg"


def load(data: str | os.PathLike[str], img_size: int | None = None) -> Images:
    """Reads data/<class>/**, or data/train/<class>/** with data/val/<class>/** (validation, valid, test).

    Where nothing is held out, a fifth of every class is: the images whose relative path has the smallest
    SHA-256, so that neither the order nor the place of the folder matters and the choice stays the same.
    Hidden files, hidden folders and files that are no images are left out. An image that cannot be decoded is
    skipped and listed in `skipped`. img_size (default 64) is the side of the centre square that is kept.
    """
    root = Path(data).expanduser()
    size = IMG_SIZE if img_size is None else img_size
    if not root.is_dir():
        kind = "a file" if root.is_file() else "nothing"
        raise NotADirectoryError(
            f"data: expected an image folder, got {kind} at {root}; give the path of one laid out as {LAYOUT}"
        )
    parts = {path.name.lower(): path for path in folders(root)}
    train = parts.get("train")
    val = next((parts[name] for name in VAL_NAMES if name in parts), None)
    if train is None or val is None:
        source = train or root
        classes = classes_of(source)
        images, labels, paths, skipped = _read(source, classes, size)
        _check_counts(classes, labels, 2, source, skipped)
        chosen = held_out(labels, paths)
        split = f"{HELD_OUT:.0%} of every class, chosen by the hash of the file name"
        parts_of = [(images[~chosen], labels[~chosen]), (images[chosen], labels[chosen])]
    else:
        classes = classes_of(train)
        if (other := classes_of(val)) != classes:
            odd = sorted(set(classes) ^ set(other))
            raise ValueError(
                f"data: {train.name} and {val.name} in {root} must hold the same classes, got "
                f"{some(odd)} in only one of them; give every class a folder in both"
            )
        parts_of, skipped = [], []
        for part in (train, val):
            images, labels, _, unread = _read(part, classes, size)
            _check_counts(classes, labels, 1, part, unread)
            parts_of.append((images, labels))
            skipped += [{**entry, "path": f"{part.name}/{entry['path']}"} for entry in unread]
        split = f"the folders {train.name} and {val.name}"
    (train_images, train_labels), (val_images, val_labels) = parts_of
    return Images(
        root.resolve().name,
        classes,
        train_images,
        train_labels,
        val_images,
        val_labels,
        split,
        photos=True,
        skipped=skipped,
    )


def folders(folder: Path) -> list[Path]:
    """The visible sub-folders by name."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: OSError) -> OSError:
    return type(error)(
        f"data: expected a folder that can be read, got {error.strerror!r} at {folder}; change its rights"
    )


def classes_of(folder: Path) -> list[str]:
    """Names of the class folders; ValueError where there are fewer than two."""
    classes = [path.name for path in folders(folder)]
    if len(classes) < 2:
        got = f"only {classes[0]!r}" if classes else "none"
        raise ValueError(
            f"data: expected at least two class folders in {folder}, got {got}; lay it out as {LAYOUT}"
        )
    return classes


def files_of(folder: Path) -> Iterator[Path]:
    """All visible image files below a folder, sorted; links to folders are followed, but not in circles."""

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from None

    seen = set()
    for where, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(where))
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".") and os.path.realpath(os.path.join(where, name)) not in seen
        )
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS):
                yield Path(where, name)


def _read(
    folder: Path, classes: list[str], size: int
) -> tuple[Tensor, Tensor, list[str], list[dict[str, str]]]:
    """images, labels, paths relative to `folder`, and what was skipped."""
    files = [(path, label) for label, name in enumerate(classes) for path in files_of(folder / name)]
    paths = [path.relative_to(folder).as_posix() for path, _ in files]
    images, good, failed = decode_all(lambda i: _try_decode(files[i][0], size), len(files), size, folder)
    labels = torch.tensor([files[i][1] for i in good], dtype=torch.int64)
    skipped = [{"path": paths[i], "reason": why} for i, why in failed]
    return images, labels, [paths[i] for i in good], skipped


def decode_all(
    decode: Callable[[int], Tensor | str], count: int, size: int, where: object
) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """uint8 (decoded, 3, size, size), the positions of these, and positions and reasons of the others.

    Args:
        decode: the image at a position, or why there is none; called by several threads.
        where: they come from, for the refusal.
    """
    try:
        images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    except RuntimeError:
        raise ValueError(
            f"data: expected images that fit into memory, got {count:,} of {size} px in {where}, which "
            f"take {count * 3 * size * size / 2**30:.1f} GiB; choose a smaller img_size or fewer images"
        ) from None
    good, failed = [], []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        with warnings.catch_warnings():  # PIL warns of odd metadata in images that it reads well
            warnings.simplefilter("ignore")
            for position, found in enumerate(pool.map(decode, range(count))):
                if isinstance(found, str):
                    failed.append((position, found))
                    continue
                images[len(good)] = found
                good.append(position)
    finally:  # Ctrl-C does not wait for the images that are left
        pool.shutdown(cancel_futures=True)
    return images[: len(good)], good, failed


def _try_decode(path: Path, size: int) -> Tensor | str:
    """The image, or why there is none."""
    try:
        return decode(path, size)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        return reason(error, path)


def _check_counts(
    classes: list[str], labels: Tensor, least: int, folder: Path, skipped: list[dict[str, str]]
) -> None:
    counts = labels.bincount(minlength=len(classes)).tolist()
    few = [f"{name!r} with {count}" for name, count in zip(classes, counts, strict=True) if count < least]
    if not few:
        return
    unread = (
        f" ({len(skipped)} files could not be decoded, {skipped[0]['path']}: {skipped[0]['reason']})"
        if skipped
        else ""
    )
    raise ValueError(
        f"data: expected at least {least} readable image{'s' if least > 1 else ''} in every class folder of "
        f"{folder}, got {some(few)}{unread}; add images ({', '.join(IMG_EXTENSIONS)}) "
        f"or remove the folder"
    )


def held_out(labels: Tensor, paths: list[str]) -> Tensor:
    """True for a fifth of every class, at least one image."""
    hashes = [hashlib.sha256(os.fsencode(path)).digest() for path in paths]
    ranked = torch.tensor(sorted(range(len(paths)), key=hashes.__getitem__))
    chosen = torch.zeros(len(paths), dtype=torch.bool)
    for label in labels.unique():
        members = ranked[labels[ranked] == label]
        chosen[members[: max(1, round(HELD_OUT * len(members)))]] = True
    return chosen


def some(items: list[str], limit: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def image_files(source: Path) -> list[Path]:
    """An image, or those of a folder and all below it, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or no image.
    """
    source = source.expanduser()
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(
            f"source: expected an image or a folder of them, got nothing at {source}; check the path"
        )
    found = list(files_of(source))
    if not found:
        raise ValueError(f"source: expected images ({', '.join(IMG_EXTENSIONS)}) below {source}, got none")
    return found

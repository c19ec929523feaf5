"""What `sansmax predict` is given: its parts, and the images of a part."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["images_of", "parts_of"]

Source = Path | io.BytesIO | str
BLOCK = 512  # of a tar; two of zeros end it


def parts_of(given: str, part_size: int) -> Iterator[Any]:
    """The parts of an image, a folder with all below it, a .tar, or shards as name-{0000..0099}.tar.

    A shard is a part, of the form {"shard": path}; images of a folder are parts of `part_size` of them,
    {"root": folder, "files": [paths below it]}, sorted folder by folder. Hidden files and folders and files
    that are neither images nor .tar are left out.

    Raises:
        OSError, ValueError: nothing is there, it cannot be read, or it is no image.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        yield from _folder(path, part_size)
    elif path.is_file():
        yield _file(path)
    elif "{" in given:
        yield from _shards(given)
    else:
        raise FileNotFoundError(
            f"input: expected an image, a folder, a .tar or shards such as name-{{0000..0099}}.tar, got "
            f"nothing at {path}; check the path"
        )


def images_of(part: dict[str, Any]) -> Iterator[tuple[str, Source]]:
    """Names, and files or contents of files; a str in their place is why there is none, or no more."""
    if "files" in part:
        for name in part["files"]:
            yield name, Path(part["root"], name)
        return
    shard = Path(part["shard"])
    try:
        with tarfile.open(shard) as opened:
            tar: Any = opened
            # Not `for member in tar`, which keeps all of them.
            while (member := tar.next()) is not None:
                tar.members.clear()
                name = Path(member.name).name
                if member.isreg() and not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS):
                    yield f"{part['name']}/{member.name}", io.BytesIO(tar.extractfile(member).read())
            # tarfile takes damage between two members for the end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                yield (
                    part["name"],
                    "the archive has no end: it is damaged or cut off, and images may be missing",
                )
    except Exception as error:  # tarfile's, the disk's, the decompressors'
        yield part["name"], " ".join(str(error).split()) or type(error).__name__


def _folder(root: Path, part_size: int) -> Iterator[dict[str, Any]]:
    def refuse(error: OSError) -> None:
        raise type(error)(
            f"input: expected a folder that can be read, got {error.strerror!r} at {error.filename}; change "
            f"its rights"
        )

    files: list[str] = []
    found = False
    top = str(root.resolve())
    for where, folders, names in os.walk(top, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            relative = os.path.relpath(os.path.join(where, name), top)
            if name.lower().endswith(".tar"):
                yield {"shard": os.path.join(where, name), "name": relative}
            elif name.lower().endswith(IMG_EXTENSIONS):
                files.append(relative)
            else:
                continue
            found = True
            if len(files) == part_size:
                yield {"root": top, "files": files}
                files = []
    if files:
        yield {"root": top, "files": files}
    if not found:
        raise ValueError(
            f"input: expected images ({', '.join(IMG_EXTENSIONS)}) or .tar files below {root}, got none; "
            f"check the path"
        )


def _file(path: Path) -> dict[str, Any]:
    whole = path.resolve()
    if path.suffix.lower() == ".tar":
        return {"shard": str(whole), "name": path.name}
    try:
        with Image.open(path):
            pass
    except Image.DecompressionBombError:
        pass  # an image, of more pixels than PIL decodes
    except Exception as error:
        raise ValueError(
            f"input: expected an image, a folder, a .tar or shards, got {path}, which is no image "
            f"({' '.join(str(error).split())}); check the path"
        ) from None
    return {"root": str(whole.parent), "files": [whole.name]}


def _shards(pattern: str) -> Iterator[dict[str, Any]]:
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise ValueError(
            f"input: expected the package that reads patterns of shards to be installed, got none for "
            f"{pattern}; pip install sansmax[data], or give the folder of the shards"
        ) from None
    names = list(braceexpand(pattern))
    if missing := [name for name in names if not Path(name).expanduser().is_file()]:
        raise FileNotFoundError(
            f"input: expected {len(names)} shards, got {len(missing)} that are not there, {missing[0]} "
            f"first; check the pattern {pattern}"
        )
    for name in names:
        yield {"shard": str(Path(name).expanduser().resolve()), "name": name}

"""Sets of labelled point clouds by their layout: ModelNet, ShapeNet part, an .npz, class folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from .folder import folders, some
from .points_files import MESHES, SUFFIXES, need, read_cloud, table

__all__ = ["Item", "Set", "find", "items_of"]

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# ShapeNet part: how many of the 50 parts, which are numbered through, each category has.
SHAPENET = {
    "Airplane": 4,
    "Bag": 2,
    "Cap": 2,
    "Car": 4,
    "Chair": 4,
    "Earphone": 3,
    "Guitar": 3,
    "Knife": 2,
    "Lamp": 4,
    "Laptop": 2,
    "Motorbike": 6,
    "Mug": 2,
    "Pistol": 3,
    "Rocket": 3,
    "Skateboard": 3,
    "Table": 3,
}
SHAPENET_PARTS = [
    f"{name}/{number}"
    for number, name in enumerate(name for name, count in SHAPENET.items() for _ in range(count))
]


@dataclass(frozen=True)
class Item:
    """A cloud that can be read: `read()` gives points (n, 3) of any number type, and the parts (n,) or
    None."""

    name: str
    label: int
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Set:
    """What a layout holds.

    Attributes:
        classes: of the shapes.
        parts: "Class/part" by number, and none where the set has no parts.
        items: by split: train, val, test; "all" of a set without splits.
    """

    title: str
    classes: list[str]
    items: dict[str, list[Item]]
    parts: list[str] = field(default_factory=list)


def find(root: str, count: int) -> Set:
    """The clouds of a folder or of an .npz.

    Args:
        count: of points that a mesh gives.

    Raises:
        ValueError, OSError: nothing that is known is there, or a file of all clouds cannot be read.
    """
    path = Path(root).expanduser()
    if path.suffix.lower() == ".npz" and path.is_file():
        return _npz(path)
    if not path.is_dir():
        kind = f"a {path.suffix} file" if path.is_file() else "nothing"
        raise FileNotFoundError(
            f"data.root: expected solids, an .npz or a folder of point clouds, got {kind} at {path}; "
            "check the path"
        )
    if (path / "synsetoffset2category.txt").is_file():
        return _shapenet(path)
    for folder in (path, path / "hdf5_data"):
        if any(folder.glob("*train*.h5")):
            return _hdf5(folder, path.name)
    return _folders(path, count)


def _npz(path: Path) -> Set:
    """xyz (n, points, 3), label (n,), and where there are: part (n, points), split (n,) with 0 for train, 1
    for test, 2 for val, classes, parts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        xyz, labels = found["xyz"], found["label"].astype(np.int64).reshape(-1)
    except Exception as error:  # zipfile's, numpy's, KeyError
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.root: expected an .npz with xyz (n, points, 3) and label (n,), got {words} in {path}; "
            "docs/points.md has the layout"
        ) from None
    part, split = found.get("part"), found.get("split")
    for name, array in (("label", labels), ("part", part), ("split", split)):
        if array is not None and len(array) != len(xyz):
            raise ValueError(
                f"data.root: expected as many entries of {name} as clouds, {len(xyz)}, got {len(array)} in "
                f"{path}; docs/points.md has the layout"
            )
    classes = _names(found["classes"]) if "classes" in found else _numbers(labels)
    items = items_of(path.name, xyz, labels, part)
    by_split: dict[str, list[Item]] = {"all": items}
    if split is not None:
        by_split = {
            name: [item for item, own in zip(items, split.tolist(), strict=True) if own == number]
            for number, name in enumerate(("train", "test", "val"))
        }
    return Set(path.stem, classes, by_split, _names(found["parts"]) if "parts" in found else [])


def _hdf5(folder: Path, title: str) -> Set:
    """*train*.h5, *val*.h5 and *test*.h5 with data (n, points, 3), label (n, 1), and of parts pid (n,
    points); names in shape_names.txt or all_object_categories.txt."""
    h5py = need("h5py", ".h5")
    items: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    seen, with_parts = [], False
    for path in sorted(folder.glob("*.h5")):
        split = next((name for name in items if name in path.stem), None)
        if split is None:
            continue
        try:
            with h5py.File(path, "r") as file:
                xyz, labels = file["data"][:], file["label"][:].astype(np.int64).reshape(-1)
                part = file["pid"][:].astype(np.int64) if "pid" in file else None
        except (OSError, KeyError) as error:
            raise ValueError(
                f"data.root: expected data and label in {path}, got {' '.join(str(error).split())}; fetch it "
                "again"
            ) from None
        items[split] += items_of(path.name, xyz, labels, part)
        seen.append(labels)
        with_parts = with_parts or part is not None
    names = folder / "shape_names.txt"
    categories = folder / "all_object_categories.txt"
    if names.is_file():
        classes = names.read_text().split()
    elif categories.is_file():
        classes = [line.split()[0] for line in categories.read_text().splitlines() if line.strip()]
    else:
        classes = list(SHAPENET) if with_parts else _numbers(np.concatenate(seen))
    return Set(title, classes, items, SHAPENET_PARTS if with_parts else [])


def _shapenet(root: Path) -> Set:
    """synsetoffset2category.txt, <synset>/*.txt with x y z nx ny nz part, and
    train_test_split/shuffled_{train,val,test}_file_list.json."""
    lines = (root / "synsetoffset2category.txt").read_text().splitlines()
    synsets = {line.split()[1]: line.split()[0] for line in lines if len(line.split()) == 2}
    classes = list(synsets.values())
    if odd := [name for name in classes if name not in SHAPENET]:
        raise ValueError(
            f"data.root: expected ShapeNet part's categories in {root}, got {some(odd)}; write other sets as "
            ".npz (docs/points.md)"
        )

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        rows = table(path)
        if not (rows[:, -1] == rows[:, -1].round()).all():
            raise ValueError("a last column of other things than parts")
        return rows[:, :3], rows[:, -1].astype(np.int64)

    items: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for split in items:
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        listed = json.loads(path.read_text()) if path.is_file() else []
        for synset, name in (entry.split("/")[-2:] for entry in listed):
            if synset in synsets:
                path = root / synset / f"{name}.txt"
                label = classes.index(synsets[synset])
                items[split].append(Item(f"{synset}/{path.name}", label, partial(read, path)))
    return Set(root.resolve().name, classes, items, SHAPENET_PARTS)


def _folders(root: Path, count: int) -> Set:
    """<class>/{train,test}/*, {train,test}/<class>/*, or <class>/*, perhaps with lists *_train.txt and
    *_test.txt of the names."""
    inner = {folder.name.lower() for folder in folders(root)}
    split_first = bool(inner) and inner <= set(SPLITS)
    listed = {
        name: split
        for split in ("train", "val", "test")
        for path in root.glob(f"*_{split}.txt")
        for name in path.read_text().split()
    }
    found: list[tuple[str | None, str, Path]] = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        if path.suffix.lower() not in SUFFIXES or any(p.startswith((".", "__MACOSX")) for p in inside):
            continue
        if not path.is_file() or len(inside) < 2 + split_first:
            continue
        first, second = inside[0], inside[1]
        if split_first:
            found.append((SPLITS[first.lower()], second, path))
        else:
            split = SPLITS.get(second.lower()) if len(inside) > 2 else listed.get(path.stem)
            found.append((split, first, path))
    if not found:
        raise ValueError(
            f"data.root: expected <class>/*{{{','.join(SUFFIXES)}}}, with or without train and test above or "
            f"below the classes, got none in {root}; docs/points.md lists the layouts"
        )
    if any(path.suffix.lower() in MESHES for _, _, path in found):
        need("trimesh", "/".join(MESHES))
    classes = sorted({name for _, name, _ in found})
    items: dict[str, list[Item]] = {}
    whole = all(split is None for split, _, _ in found)
    for split, name, path in found:
        item = Item(path.relative_to(root).as_posix(), classes.index(name), partial(read_cloud, path, count))
        if whole or split is not None:
            items.setdefault(split or "all", []).append(item)
    return Set(root.resolve().name, classes, items)


def items_of(name: str, xyz: np.ndarray, labels: np.ndarray, part: np.ndarray | None) -> list[Item]:
    """Of arrays that hold all clouds of a file."""

    def read(i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return xyz[i], None if part is None else part[i]

    return [Item(f"{name}[{i}]", int(label), partial(read, i)) for i, label in enumerate(labels)]


def _names(array: np.ndarray) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]


def _numbers(labels: np.ndarray) -> list[str]:
    return [str(i) for i in range(int(labels.max(initial=-1)) + 1)]

"""Images with a mask each: the layouts of PASCAL VOC and ADE20K, and folders of images and masks."""

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from .._recipes.segmentation import MaskData
from ._decode import reason, to_rgb
from .draws import order
from .folder import files_of, held_out, some

__all__ = ["IGNORED", "MOST", "VOC", "Scenes", "inside", "open_scenes"]

IGNORED, OUTSIDE = 255, 254  # of a mask in memory: no class, and a value that is none of the set's
MOST = 254  # classes
VOC = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
ADE_CLASSES = 150
SYNONYMS = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
IMAGES, MASKS = ("images", "imgs", "image"), ("masks", "labels", "annotations", "mask")
LAYOUTS = (
    "FOLDER/images/<split> with FOLDER/masks/<split>, FOLDER/<split> with FOLDER/<split>annot, or "
    "FOLDER/<split>/images with FOLDER/<split>/masks"
)


class Reader(Protocol):
    """Images and masks; it goes to the processes that decode."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (height, width, 3), and the mask's values (height, width)."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Scenes:
    """A split.

    Attributes:
        meaning: uint8 (256,), the class of each value of a mask, IGNORED or OUTSIDE.
        positions: of the split's images in the reader.
    """

    title: str
    classes: list[str]
    reader: Reader
    meaning: np.ndarray
    positions: np.ndarray = field(default_factory=lambda: np.arange(0))

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        return self.reader.name(int(self.positions[index]))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image (height, width, 3) and classes (height, width), IGNORED where there is none.

        Raises:
            Exception: of many kinds, where one of the two cannot be read or they do not fit.
        """
        image, values = self.reader.read(int(self.positions[index]))
        if values.shape != image.shape[:2]:
            raise ValueError(
                f"mask of {values.shape[1]}x{values.shape[0]} pixels, image of {image.shape[1]}x"
                f"{image.shape[0]}"
            )
        mask = self.meaning[np.minimum(values, 255)]
        outside = (mask == OUTSIDE) | (values > 255) | (values < 0)
        if outside.any():
            raise ValueError(f"value {values[outside].max()} in its mask is no class")
        return image, mask

    def first(self, count: int | None) -> "Scenes":
        """The first `count` of a shuffle that is always the same."""
        if count is None or count >= len(self):
            return self
        return replace(self, positions=self.positions[order(len(self), 0, 0)[:count].numpy()])


@dataclass(frozen=True)
class _Files:
    """Pairs of files, of which one may be missing; then it is said when the pair is read."""

    root: Path
    pairs: list[tuple[Path | None, Path | None]]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        path = next(path for path in self.pairs[index] if path)
        return path.relative_to(self.root).as_posix()

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.pairs[index]
        if mask is None or image is None:
            raise ValueError("no mask of that name" if mask is None else "no image of that name")
        with Image.open(image) as opened:
            pixels = np.array(to_rgb(opened))
        try:
            return pixels, values_of(mask)
        except Exception as error:
            raise ValueError(f"its mask: {reason(error, mask)}") from None


def values_of(path: Path) -> np.ndarray:
    """The values of a mask (height, width)."""
    with Image.open(path) as opened:
        if opened.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"expected one channel of class numbers, got {opened.mode}")
        values = np.array(opened)
    return values.astype(np.uint8) if values.dtype == bool else values


def open_scenes(data: MaskData) -> tuple[Scenes, Scenes]:
    """Training and held-out split.

    Raises:
        ValueError, OSError: nothing is there, or it is not laid out as it must be; one sentence says what to
            do.
    """
    if data.root == "digits":
        from .digit_scenes import scenes

        found = scenes()
    else:
        root = Path(data.root).expanduser()
        if not root.is_dir():
            raise NotADirectoryError(
                f"data.root: expected a folder, got {'a file' if root.is_file() else 'nothing'} at {root}; "
                f"give the path of VOCdevkit/VOC2012, of ADEChallengeData2016, or of {LAYOUTS}"
            )
        voc = inside(root, ("VOC2012", "VOCdevkit/VOC2012"), "ImageSets/Segmentation")
        ade = inside(root, ("ADEChallengeData2016",), "annotations/training")
        found = _voc(voc, data) if voc else _ade(ade, data) if ade else _folder(root, data)
    train, val = found
    return train.first(data.num_samples), val.first(data.val_samples)


def inside(root: Path, below: Iterable[str], sign: str) -> Path | None:
    return next((path for path in (root, *(root / name for name in below)) if (path / sign).is_dir()), None)


def _scenes(title: str, classes: list[str], meaning: np.ndarray, root: Path, pairs: list) -> Scenes:
    return Scenes(title, classes, _Files(root, pairs), meaning, np.arange(len(pairs)))


def _meaning(values: dict[int, int]) -> np.ndarray:
    found = np.full(256, OUTSIDE, np.uint8)
    for value, label in values.items():
        if 0 <= value < 256:
            found[value] = label
    return found


def _voc(root: Path, data: MaskData) -> tuple[Scenes, Scenes]:
    """PASCAL VOC 2012; trainaug.txt, with masks in SegmentationClassAug, is that of SBD."""
    meaning = _meaning({i: i for i in range(len(VOC))} | {255: IGNORED})

    def split(name: str) -> Scenes:
        file = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not file.is_file():
            there = sorted(path.stem for path in file.parent.glob("*.txt"))
            raise FileNotFoundError(
                f"data.split: expected a list at {file}, got none; there are {some(there, 8)}"
            )
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        pairs = [_voc_pair(root, words, name) for words in lines]
        if not pairs:
            raise ValueError(f"data.split: expected names of images in {file}, got none; fetch it again")
        return _scenes(f"{root.name} {name}", VOC, meaning, root, pairs)

    return split(data.split), split(data.val_split)


def _voc_pair(root: Path, words: list[str], split: str) -> tuple[Path | None, Path | None]:
    """Of a line: a name, or the paths of both files."""
    if len(words) > 1:
        image, masks = root / words[0].lstrip("/"), [root / words[1].lstrip("/")]
    else:
        folders = ["SegmentationClass", "SegmentationClassAug"]
        image = root / "JPEGImages" / f"{words[0]}.jpg"
        masks = [root / f / f"{words[0]}.png" for f in folders[:: -1 if split == "trainaug" else 1]]
    return image, next((mask for mask in masks if mask.is_file()), None)


def _ade(root: Path, data: MaskData) -> tuple[Scenes, Scenes]:
    """ADE20K of the scene parsing challenge: 0 is "other", 1 to 150 are classes."""
    meaning = _meaning({0: IGNORED} | {i + 1: i for i in range(ADE_CLASSES)})
    table = root / "objectInfo150.txt"
    classes = [str(i + 1) for i in range(ADE_CLASSES)]
    if table.is_file():
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        names = [row[-1].split(",")[0].strip() for row in rows if len(row) > 1]
        classes = names if len(names) == ADE_CLASSES else classes
    parts = []
    for name in (data.split, data.val_split):
        folder = {"train": "training", "val": "validation"}.get(name, name)
        pairs = list(_pairs(_there(root / "images" / folder), _there(root / "annotations" / folder)))
        parts.append(_scenes(f"{root.name} {folder}", classes, meaning, root, pairs))
    return parts[0], parts[1]


def _there(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.split: expected a folder at {folder}, got none; check data.root and the split"
        )
    return folder


def _folder(root: Path, data: MaskData) -> tuple[Scenes, Scenes]:
    parts, shared = [], _both(root, "")
    for name in (data.split, data.val_split):
        found = _split(root, name)
        if found is None and not (shared and not parts):
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folder"
            raise FileNotFoundError(
                f"data.root: expected images and masks of the split {name!r} in {root}, got {there}; lay "
                f"them out as {LAYOUTS}"
            )
        if found is None:
            break
        parts.append(list(_pairs(*found)))
    titles = [f"{root.resolve().name} {name}" for name in (data.split, data.val_split)]
    if not parts and shared:
        pairs = list(_pairs(*shared))
        names = [str((image or mask or root).relative_to(root)) for image, mask in pairs]
        held = held_out(torch.zeros(len(pairs), dtype=torch.int64), names) if len(pairs) > 1 else []
        parts = [[p for p, h in zip(pairs, held, strict=False) if bool(h) == want] for want in (False, True)]
        titles[1] = f"a fifth of {root.resolve().name}, chosen by the hash of the file name"
    if not all(parts):
        raise ValueError(
            f"data.root: expected at least an image with its mask in both splits of {root}, got none; lay "
            f"them out as {LAYOUTS}"
        )
    classes, meaning = _classes(root, data, [mask for _, mask in parts[0] if mask])
    train, val = (_scenes(t, classes, meaning, root, p) for t, p in zip(titles, parts, strict=True))
    return train, val


def _split(root: Path, name: str) -> tuple[Path, Path] | None:
    """The folders of a split's images and masks."""
    for word in (name, *next((words for words in SYNONYMS if name in words), ())):
        for found in (_both(root, word), _one(root / word, root / f"{word}annot"), _both(root / word, "")):
            if found:
                return found
    return None


def _both(root: Path, below: str) -> tuple[Path, Path] | None:
    """Of images and masks beside each other."""
    found = [
        next((root / name / below for name in names if (root / name / below).is_dir()), None)
        for names in (IMAGES, MASKS)
    ]
    return _one(found[0], found[1])


def _one(images: Path | None, masks: Path | None) -> tuple[Path, Path] | None:
    return (images, masks) if images and masks and images.is_dir() and masks.is_dir() else None


def _pairs(images: Path, masks: Path) -> Iterator[tuple[Path | None, Path | None]]:
    """Files of the same path but for their ending, in the order of the images; then masks that are left."""
    by_name = {path.relative_to(masks).with_suffix(""): path for path in files_of(masks)}
    for path in files_of(images):
        yield path, by_name.pop(path.relative_to(images).with_suffix(""), None)
    for path in by_name.values():
        yield None, path


def _classes(root: Path, data: MaskData, masks: list[Path]) -> tuple[list[str], np.ndarray]:
    """Names, and what the values of a mask mean."""
    file = root / "classes.txt"
    names = list(data.classes)
    if not names and file.is_file():
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    values = range(len(names))
    if not names:
        values = sorted(_values(masks) - {data.ignore})
        names = [str(value) for value in values]
    elif data.ignore in values:
        values = [value for value in values if value != data.ignore]
        names = [names[value] for value in values]
    if not 2 <= len(names) <= MOST:
        where = "data.classes" if data.classes else file if file.is_file() else f"the masks of {root}"
        raise ValueError(
            f"data.classes: expected 2 to {MOST} classes, got {len(names)} ({some(names)}) from {where}; "
            f"write one name a line into {file.name}, or say with data.ignore which value counts nowhere"
        )
    return names, _meaning({data.ignore: IGNORED} | {value: i for i, value in enumerate(values)})


def _values(masks: list[Path]) -> set[int]:
    """All values that are in masks which can be read."""

    def one(path: Path) -> set[int]:
        try:
            return set(np.unique(values_of(path)).tolist())
        except Exception:  # said when the pair is read
            return set()

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        return set().union(*pool.map(one, masks)) & set(range(256))

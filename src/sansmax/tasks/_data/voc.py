"""PASCAL VOC's layout: JPEGImages, Annotations, ImageSets/Main, SegmentationObject."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from faster_coco_eval import mask as codes
from PIL import Image

from .folder import some
from .masks import VOC, inside
from .objects import Files, Objects, Rejected, clipped, truth_of

__all__ = ["folder", "read"]

NUMBERS = {name: i for i, name in enumerate(VOC[1:])}


def folder(root: Path) -> Path | None:
    """Where Annotations and ImageSets are."""
    names = [f"{above}VOC{year}" for above in ("", "VOCdevkit/") for year in (2012, 2007)]
    return inside(root, names, "Annotations")


def read(root: Path, split: str, masks: bool) -> Objects:
    """A split: the names in ImageSets/Main/<split>.txt, with masks in ImageSets/Segmentation/<split>.txt.
    What is marked as difficult counts as COCO's crowd: not learned, and not missed in evaluation.

    Raises:
        ValueError, OSError: see open_objects.
    """
    file = root / "ImageSets" / ("Segmentation" if masks else "Main") / f"{split}.txt"
    if not file.is_file():
        there = sorted(path.stem for path in file.parent.glob("*.txt") if "_" not in path.stem)
        raise FileNotFoundError(
            f"data.split: expected a list at {file}, got none; there are {some(there, 8) or 'no others'}"
        )
    names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"data.split: expected names of images in {file}, got none; fetch it again")
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda name: _image(root, name, masks), names))
    paths = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    truths, sizes, whys = zip(*parts, strict=True)
    return Objects(
        f"{root.name} {split}",
        [f"{i + 1} {name}" for name, i in NUMBERS.items()],
        Files(root, paths, list(sizes)),
        list(truths),
        list(sizes),
        [(i, *one) for i, some_of_it in enumerate(whys) for one in some_of_it],
        np.arange(len(names)),
    )


def _image(root: Path, name: str, masks: bool) -> tuple[Any, tuple[int, int], list[tuple[str, str]]]:
    """Its objects, height and width, and why others cannot be used."""
    file = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(file).getroot()
        height, width = (int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"data: expected an annotation with the image's size at {file}, got {error}; fetch it again"
        ) from None
    values = _segments(root, name) if masks else None
    rows, rejected = [], []
    for number, entry in enumerate(tree.iter("object"), 1):
        label = NUMBERS.get(kind := entry.findtext("name", "").strip())
        if label is None:
            raise ValueError(
                f"data: expected one of VOC's {len(NUMBERS)} classes in {file}, got {kind!r}; mend the file"
            )
        corners = [entry.findtext(f"bndbox/{corner}", "nan") for corner in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(float, corners)
            box = clipped([x1 - 1, y1 - 1, x2, y2], height, width)  # VOC counts pixels from 1, both included
            code = None
            if values is not None:
                where = values == number
                if values.shape != (height, width) or not where.any():
                    raise Rejected("it has no pixel in SegmentationObject")
                code = codes.encode(np.asfortranarray(where.astype(np.uint8)))
        except ValueError as why:
            rejected.append((f"object {number}", str(why)))
            continue
        area = float(codes.area(code)) if code else (box[2] - box[0]) * (box[3] - box[1])
        rows.append((box, label, entry.findtext("difficult", "0").strip() == "1", area, code))
    return truth_of(rows, masks), (height, width), rejected


def _segments(root: Path, name: str) -> np.ndarray:
    file = root / "SegmentationObject" / f"{name}.png"
    try:
        with Image.open(file) as opened:
            return np.array(opened)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"data: expected a picture of the objects at {file} for mask_rcnn, got {error}; use --detector "
            "retinanet or faster_rcnn"
        ) from None

"""COCO's layout: annotations/instances_<split>.json, and a folder of images for every split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask as codes
from PIL import Image

from .folder import some
from .objects import RLE, Files, Objects, Rejected, clipped, truth_of

__all__ = ["read"]


def read(root: Path, split: str, masks: bool) -> Objects:
    """A split: annotations/instances_<split>.json or instances_<split>2017.json, images in <split> or
    images/<split>. Masks are the file's polygons or codes, or else segments/<split>/*.png, in which a pixel
    has the number of its segment, with annotations/segments_<split>.json; the boxes are then those of the
    segments.

    Raises:
        ValueError, OSError: see open_objects.
    """
    name, file = _file(root, split)
    content = _loaded(file)
    if masks and not any(entry.get("segmentation") for entry in content["annotations"]):
        segments = root / "annotations" / f"segments_{name}.json"
        if segments.is_file():
            return _segments(root, name, segments, content)
        raise ValueError(
            f"data: expected a segmentation of every object for mask_rcnn, got boxes alone in {file}; use "
            "--detector retinanet or faster_rcnn, or add segments/<split>/*.png with "
            "annotations/segments_<split>.json"
        )
    numbers = _categories(content, file)
    pictures, by_id = _pictures(root, name, content, file)
    rows: list[list[Any]] = [[] for _ in pictures.paths]
    rejected: list[tuple[int, str, str]] = []
    for entry in content["annotations"]:
        position = by_id.get(entry.get("image_id"))
        who = f"object {entry.get('id')}"
        if position is None:
            raise ValueError(
                f"data: expected images that {file} lists, got image {entry.get('image_id')} of {who}; mend "
                "the file"
            )
        label = numbers.get(entry.get("category_id"))
        if label is None:
            raise ValueError(
                f"data: expected a category that {file} lists, got {entry.get('category_id')} of {who}; mend "
                "the file"
            )
        size = pictures.sizes[position]
        try:
            box = clipped(_corners(entry.get("bbox")), *size)
            code = _code(entry.get("segmentation"), size) if masks else None
            area = float(entry.get("area", (box[2] - box[0]) * (box[3] - box[1])))
            rows[position].append((box, label, bool(entry.get("iscrowd")), area, code))
        except Rejected as why:
            rejected.append((position, who, str(why)))
    truths = [truth_of(some, masks) for some in rows]
    return Objects(
        f"{root.resolve().name} {name}",
        _names(content),
        pictures,
        truths,
        pictures.sizes,
        rejected,
        np.arange(len(truths)),
    )


def _file(root: Path, split: str) -> tuple[str, Path]:
    folder = root / "annotations"
    for name in (split, f"{split}2017"):
        if (file := folder / f"instances_{name}.json").is_file():
            return name, file
    there = sorted(path.name for path in folder.glob("*.json"))
    raise FileNotFoundError(
        f"data.root: expected {folder / f'instances_{split}.json'}, got {some(there, 6) or 'no .json'} "
        "there; check data.root and the split, or give a VOCdevkit/VOC2012"
    )


def _loaded(file: Path) -> dict[str, Any]:
    """Raises: ValueError where it is no file of COCO's."""
    lists = ("images", "annotations", "categories")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"data: expected COCO's JSON in {file}, got {error}; fetch it again") from None
    if not isinstance(content, dict) or not all(_listed(content.get(name)) for name in lists):
        raise ValueError(
            f"data: expected lists of images, annotations and categories in {file}, got something else; give "
            "a file of COCO's layout"
        )
    return content


def _listed(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _categories(content: dict[str, Any], file: Path) -> dict[int, int]:
    """Labels by number."""
    numbers = [category.get("id") for category in content["categories"]]
    whole = all(isinstance(number, int) for number in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"data: expected categories with a whole number each, all different, in {file}, got "
            f"{some([str(number) for number in numbers]) or 'none'}; mend the file"
        )
    return {number: label for label, number in enumerate(numbers)}


def _names(content: dict[str, Any]) -> list[str]:
    return [f"{category['id']} {category.get('name', category['id'])}" for category in content["categories"]]


def _pictures(root: Path, name: str, content: dict[str, Any], file: Path) -> tuple[Files, dict[Any, int]]:
    """The images, and their positions by number."""
    folders = [root / name, root / "images" / name, root / "images", root]
    folder = next(folder for folder in folders if folder.is_dir())
    images = content["images"]
    fit = [
        isinstance(image.get("file_name"), str)
        and all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width"))
        for image in images
    ]
    if not images or not all(fit):
        got = "none" if not images else f"{images[fit.index(False)]}"
        raise ValueError(
            f"data: expected images with file_name, height and width in {file}, got {got}; mend the file"
        )
    paths = [folder / image["file_name"] for image in images]
    sizes = [(image["height"], image["width"]) for image in images]
    return Files(root, paths, sizes), {image.get("id"): i for i, image in enumerate(images)}


def _corners(box: Any) -> Any:
    """x y width height -> x1 y1 x2 y2; anything else as it is."""
    try:
        x, y, width, height = box
        return [x, y, x + width, y + height]
    except (TypeError, ValueError):
        return box


def _code(segmentation: Any, size: tuple[int, int]) -> RLE:
    """Of polygons, of counts, or of a code.

    Raises:
        Rejected: it is none of them, or empty.
    """
    height, width = size
    code: Any
    try:
        if isinstance(segmentation, list):
            polygons: Any = codes.frPyObjects(segmentation, height, width)
            code = codes.merge(polygons)
        elif isinstance(segmentation["counts"], list):
            code = codes.frPyObjects(segmentation, height, width)
        else:
            counts = segmentation["counts"]
            counts = counts.encode() if isinstance(counts, str) else counts
            code = {"size": list(segmentation["size"]), "counts": counts}
        empty = not codes.area(code)
    except Exception as error:
        raise Rejected(f"its segmentation is neither polygons nor a run-length code ({error})") from None
    if list(code["size"]) != [height, width]:
        raise Rejected(f"its segmentation is of {code['size']}, the image of {[height, width]}")
    if empty:
        raise Rejected("its segmentation has no pixel")
    return code


def _segments(root: Path, name: str, file: Path, content: dict[str, Any]) -> Objects:
    """From a picture of segments for every image; what is no thing (sky, grass) is no object."""
    found = _loaded_segments(file)
    numbers = _categories(content, file)
    pictures, by_id = _pictures(root, name, content, file)
    paths, sizes, truths = [], [], []
    rejected: list[tuple[int, str, str]] = []
    for entry in found:
        at = by_id.get(entry.get("image_id"))
        if at is None:
            raise ValueError(
                f"data: expected images that instances_{name}.json lists, got image "
                f"{entry.get('image_id')} in {file}; mend the file"
            )
        position, rows = len(paths), []
        paths.append(pictures.paths[at])
        sizes.append(pictures.sizes[at])
        picture = root / "segments" / name / entry["file_name"]
        try:
            with Image.open(picture) as opened:
                values = np.array(opened)
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"data: expected a picture of the segments at {picture}, got {error}; check the files"
            ) from None
        for segment in entry["segments"]:
            if not segment.get("isthing", 1):
                continue
            label = numbers.get(segment["category_id"])
            if label is None:
                raise ValueError(
                    f"data: expected a category that instances_{name}.json lists, got "
                    f"{segment['category_id']} in {file}; mend the file"
                )
            where = values == segment["index"]
            if values.shape != sizes[-1] or not where.any():
                why = "its picture has another size" if where.any() else "it has no pixel"
                rejected.append((position, f"segment {segment['index']}", why))
                continue
            code = codes.encode(np.asfortranarray(where.astype(np.uint8)))
            x, y, width, height = map(float, codes.toBbox(code))
            rows.append(
                ([x, y, x + width, y + height], label, bool(segment["iscrowd"]), float(where.sum()), code)
            )
        truths.append(truth_of(rows, True))
    return Objects(
        f"{root.resolve().name} {name}, {len(paths)} images with segments",
        _names(content),
        Files(root, paths, sizes),
        truths,
        sizes,
        rejected,
        np.arange(len(paths)),
    )


def _loaded_segments(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_bytes())["annotations"]
        fit = _listed(found) and all(
            isinstance(entry["file_name"], str)
            and all({"index", "category_id"} <= part.keys() for part in entry["segments"])
            for entry in found
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        fit, found = False, []
    if not fit or not found:
        raise ValueError(
            f"data: expected images with file_name and segments of index and category_id in {file}, got "
            "something else; fetch it again"
        )
    return found

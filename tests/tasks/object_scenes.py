"""Small sets of images with objects, in COCO's and VOC's layout, and a run that learns in a moment."""

import json
from pathlib import Path

import numpy as np
from faster_coco_eval import mask as codes
from PIL import Image
from street_scenes import SMALL, picture

from sansmax.tasks._recipes.detection import ObjectData, Recipe
from sansmax.train.recipe import Optim

RUN = Recipe(
    mechanism="sima",
    model_args=SMALL,
    anchor_sizes=(12, 24, 48, 96, 192),
    fpn_channels=8,
    head_channels=16,
    short_sides=(32, 40),
    long_side=60,
    epochs=2,
    batch_size=4,
    device="cpu",
    optim=Optim(lr=1e-2, lr_batch=None, per="update", warmup=0, min_lr=0.0),
)
SIZES = [(37, 50), (50, 37), (41, 41), (37, 50), (33, 60), (45, 39)]  # height, width
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "ice cream"}]


def code(height, width, box):
    """Counts, compressed, of the inside of x1 y1 x2 y2."""
    mask = np.zeros((height, width), np.uint8)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    found = codes.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": found["counts"].decode()}


def annotation(number, image, category, box, segmentation=None, crowd=0):
    """Of x1 y1 x2 y2."""
    x1, y1, x2, y2 = box
    one = {"id": number, "image_id": image, "category_id": category, "iscrowd": crowd}
    one |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    return one | ({} if segmentation is None else {"segmentation": segmentation})


def content(masks):
    """Six images: polygons, a code, a crowd as counts, and one image with nothing."""
    images = [
        {"id": 10 + i, "file_name": f"{i:012}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)
    ]
    polygon = [[3, 4, 20, 4, 20, 25, 3, 25]]
    height, width = SIZES[2]
    counts = [5 * height, 4 * height, width * height - 9 * height]  # columns 5 to 8
    objects = [
        annotation(1, 10, 3, (3, 4, 20, 25), polygon),
        annotation(2, 10, 8, (25, 9, 44, 30), code(*SIZES[0], (25, 9, 44, 30))),
        annotation(3, 11, 7, (6, 11, 29, 40), code(*SIZES[1], (6, 11, 29, 40))),
        annotation(4, 12, 3, (5, 0, 9, 41), {"size": [height, width], "counts": counts}, 1),
        annotation(5, 12, 7, (15, 10, 35, 31), code(height, width, (15, 10, 35, 31))),
        annotation(6, 14, 8, (10, 3, 41, 28), code(*SIZES[4], (10, 3, 41, 28))),
        annotation(7, 15, 3, (7, 8, 30, 33), code(*SIZES[5], (7, 8, 30, 33))),
    ]
    if not masks:
        objects = [{k: v for k, v in one.items() if k != "segmentation"} for one in objects]
    return {"images": images, "annotations": objects, "categories": [dict(one) for one in CATEGORIES]}


def coco(root: Path, masks=True, change=lambda told: None, split="train", folder="", suffix=""):
    """A split with dark objects on noise; `change` alters the annotations before they are written."""
    told = content(masks)
    for i, (image, (height, width)) in enumerate(zip(told["images"], SIZES, strict=True)):
        path = root / folder / f"{split}{suffix}" / image["file_name"]
        picture(path, height, width, seed=i)
        pixels = np.array(Image.open(path))
        for one in told["annotations"]:
            if one["image_id"] == image["id"]:
                x, y, w, h = one["bbox"]
                pixels[y : y + h, x : x + w] = 20 * one["category_id"]
        Image.fromarray(pixels).save(path)
    change(told)
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    (root / "annotations" / f"instances_{split}{suffix}.json").write_text(json.dumps(told))
    return root


def both(tmp_path, **words):
    """Training and held-out split, of the same images."""
    for split in ("train", "val"):
        coco(tmp_path / "coco", split=split, **words)
    return tmp_path / "coco"


def data_of(root, **words):
    return ObjectData(root=str(root), workers=0, **words)


def voc(root: Path, change=lambda text: text):
    """Two images, of which the second has a difficult object."""
    boxes = {
        "a_1": [("dog", (4, 6, 20, 30), 0), ("person", (22, 3, 40, 33), 0)],
        "b_2": [("cat", (10, 9, 31, 29), 0), ("dog", (2, 2, 8, 8), 1)],
    }
    for folder in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, objects in boxes.items():
        picture(root / "JPEGImages" / f"{name}.jpg", 37, 50)
        parts, values = [], np.zeros((37, 50), np.uint8)
        for number, (kind, (x1, y1, x2, y2), difficult) in enumerate(objects, 1):
            corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            parts.append(
                f"<object><name>{kind}</name><difficult>{difficult}</difficult>"
                f"<bndbox>{corners}</bndbox></object>"
            )
            values[y1 - 1 : y2, x1 - 1 : x2] = number
        size = "<size><width>50</width><height>37</height><depth>3</depth></size>"
        text = f"<annotation>{size}{''.join(parts)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(change(text))
        values[0, 0] = 255
        path = root / "SegmentationObject" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).convert("P").save(path)
    for kind in ("Main", "Segmentation"):
        for split, name in (("train", "a_1"), ("val", "b_2")):
            (root / "ImageSets" / kind / f"{split}.txt").write_text(f"{name}\n")
    return root

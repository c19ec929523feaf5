"""What was found in images: as rows of numbers, as COCO's results, and against the truth."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as codes
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

from ._data.objects import RLE, Truth

__all__ = ["FIGURES", "Found", "agreement", "ap_of", "coco_results", "found_in", "from_rows", "to_rows"]

COLUMNS = 8  # of a row
BYTES = 6  # in a number: 48 bits, which float64 holds exactly
# COCO's summary by name: place in its statistics, and for people.
FIGURES = {
    "map": (0, "mAP, %"),
    "map_50": (1, "mAP50, %"),
    "map_75": (2, "mAP75, %"),
    "map_small": (3, "mAP small, %"),
    "map_medium": (4, "mAP medium, %"),
    "map_large": (5, "mAP large, %"),
}


@dataclass(frozen=True)
class Found:
    """Detections in an image, the surest first: boxes float64 (n, 4) in the pixels of its file, labels (n,),
    scores (n,), and of masks the codes."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[RLE] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Found":
        """Those with at least that score."""
        kept = np.flatnonzero(self.scores >= score)
        masks = None if self.masks is None else [self.masks[i] for i in kept]
        return Found(self.boxes[kept], self.labels[kept], self.scores[kept], masks)


def found_in(output: dict[str, Tensor], seen: tuple[int, int], size: tuple[int, int]) -> Found:
    """Of a network's output for an image of `seen` pixels, of which the file has `size`.

    A mask's probabilities are resized bilinearly to its box and cut at 0.5, as torchvision does.
    """
    scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2, dtype=torch.float64)
    boxes = output["boxes"].cpu().double() * scale
    masks = None
    if "masks" in output:
        masks = []
        for one, box in zip(output["masks"].cpu(), boxes.float(), strict=True):
            inside = paste_masks_in_image(one[None], box[None], size)[0, 0] > 0.5
            masks.append(codes.encode(np.asfortranarray(inside.numpy().astype(np.uint8))))
    return Found(
        boxes.numpy(), output["labels"].cpu().numpy(), output["scores"].cpu().double().numpy(), masks
    )


def to_rows(position: int, found: Found) -> Tensor:
    """Of an image float64 (rows, 8), which all begin with its position.

    First [position, detections, height, width, 0, 0, 0, 0]; then of every detection [position, label, score,
    x1, y1, x2, y2, bytes of its mask's code], followed by these bytes, 42 a row, 6 a number. An image with
    nothing found is one row. So a mask is kept exactly, as its run-length code.
    """
    size = found.masks[0]["size"] if found.masks else (0, 0)
    rows = [[position, len(found), *size, 0, 0, 0, 0]]
    for i in range(len(found)):
        content = found.masks[i]["counts"] if found.masks else b""
        rows.append([position, found.labels[i], found.scores[i], *found.boxes[i], len(content)])
        width = (COLUMNS - 1) * BYTES
        for start in range(0, len(content), width):
            part = content[start : start + width].ljust(width, b"\0")
            values = [int.from_bytes(part[at : at + BYTES], "little") for at in range(0, width, BYTES)]
            rows.append([position, *values])
    return torch.tensor(rows, dtype=torch.float64)


def from_rows(rows: Tensor) -> Iterator[tuple[int, Found]]:
    """Positions and detections of the images of whose `to_rows` these are, one behind the other."""
    values, at = rows.numpy(), 0
    while at < len(values):
        position, count, *size = map(int, values[at, :4])
        at += 1
        numbers, masks = np.zeros((count, COLUMNS)), []
        for i in range(count):
            numbers[i] = values[at]
            length = int(numbers[i, 7])
            used = -(-length // ((COLUMNS - 1) * BYTES))
            content = values[at + 1 : at + 1 + used, 1:].astype(np.uint64).astype("<u8").reshape(-1, 1)
            masks.append({"size": size, "counts": content.view(np.uint8)[:, :BYTES].tobytes()[:length]})
            at += 1 + used
        yield (
            position,
            Found(numbers[:, 3:7], numbers[:, 1].astype(int), numbers[:, 2], masks if size[0] else None),
        )


def coco_results(image: int | str, found: Found, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """In COCO's format; `numbers` are the categories'."""
    results = []
    for i, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
        one: dict[str, Any] = {
            "image_id": image,
            "category_id": numbers[found.labels[i]],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(found.scores[i]),
        }
        if found.masks is not None:
            code = found.masks[i]
            one["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
        results.append(one)
    return results


def ap_of(
    truths: Iterable[tuple[int, Truth, tuple[int, int]]],
    detections: Iterable[tuple[int, Found]],
    classes: int,
    kind: Any,
) -> tuple[dict[str, float], list[float | None]]:
    """COCO's average precision of "bbox" or "segm" by faster-coco-eval, and that of every class.

    Figures are those of FIGURES: the mean over IoU 0.5 to 0.95 and over classes of which there is an object,
    from the 100 surest detections of an image; one that has no object (none is large) is left out. Crowds
    neither count as missed nor do detections in them count as wrong.

    Args:
        truths: positions, objects and (height, width) of the images that were looked at.
        detections: what was found in them, by position.
        classes: how many.
    """
    images, objects, results = [], [], []
    for position, truth, (height, width) in truths:
        images.append({"id": position, "height": height, "width": width})
        for i, (x1, y1, x2, y2) in enumerate(truth.boxes.tolist()):
            one = {
                "id": len(objects) + 1,
                "image_id": position,
                "category_id": int(truth.labels[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(truth.areas[i]),
                "iscrowd": int(truth.crowd[i]),
            }
            if kind == "segm" and truth.masks is not None:
                one["segmentation"] = truth.masks[i]
            objects.append(one)
    # The area, by which sizes are told, is the box's for COCO's reader of results where there is a box.
    other = "segmentation" if kind == "bbox" else "bbox"
    for position, found in detections:
        results += [
            {k: v for k, v in one.items() if k != other}
            for one in coco_results(position, found, range(classes))
        ]
    categories = [{"id": i, "name": str(i)} for i in range(classes)]
    known = COCO({"images": images, "annotations": objects, "categories": categories})
    evaluation: Any = COCOeval_faster(known, known.loadRes(results), kind)
    evaluation.run()
    figures = {name: float(evaluation.stats[place]) for name, (place, _) in FIGURES.items()}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class), of any area
    shares = precision.mean((0, 1)).tolist()
    return {k: v for k, v in figures.items() if v >= 0}, [share if share >= 0 else None for share in shares]


def agreement(truth: Truth, found: Found) -> float:
    """F1 of an image: 2 |pairs| / (|objects| + |detections|), where the surest detection first takes the
    object of its class that it overlaps most, by IoU 0.5 at least; 1 where there is neither. Crowds are left
    out."""
    learned = ~truth.crowd
    boxes, labels = truth.boxes[learned], truth.labels[learned]
    if not len(boxes) and not len(found):
        return 1.0
    overlap = box_iou(torch.from_numpy(found.boxes), torch.from_numpy(boxes)).numpy()
    overlap[found.labels[:, None] != labels] = 0
    pairs = 0
    for row in np.argsort(-found.scores, kind="stable"):
        if len(boxes) and overlap[row].max() >= 0.5:
            overlap[:, overlap[row].argmax()] = 0
            pairs += 1
    return 2 * pairs / (len(boxes) + len(found))

"""Point clouds in memory: read from any layout, checked, centred and scaled into the unit ball."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._recipes.points import PointData
from . import points_sets, solids
from ._decode import reason
from .draws import draw, order
from .folder import held_out, some
from .points_sets import Item, Set

__all__ = ["KEPT", "Clouds", "Share", "in_ball", "open_clouds", "read_share", "shape_of"]

KEPT = 2048  # points of a cloud that has more, unless twice as many as the network sees are more


@dataclass(frozen=True)
class Share:
    """Clouds of a split: cloud i is xyz[starts[i] : starts[i + 1]].

    xyz: (points of all, 3) float32; starts: (count + 1,) int64; labels: (count,) int64; parts: (points of
    all,) int64, 0 where they are not asked for.
    """

    xyz: Tensor
    starts: Tensor
    labels: Tensor
    parts: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> Tensor:
        """Points of every cloud."""
        return self.starts.diff()


@dataclass(frozen=True)
class Clouds:
    """A training and a held-out share; `skipped` lists clouds that could not be used."""

    title: str
    split: str
    classes: list[str]
    parts: list[str]
    train: Share
    val: Share
    skipped: list[dict[str, str]]


def open_clouds(data: PointData, points: int, parts: bool) -> Clouds:
    """Reads the two splits.

    Args:
        points: that the network sees of a cloud.
        parts: whether every point must have a part.

    Raises:
        ValueError, OSError: nothing is there that can be used; one sentence says what to do.
    """
    keep = max(KEPT, 2 * points)
    found = solids.generate() if data.root == "solids" else points_sets.find(data.root, keep)
    classes = list(dict.fromkeys(map(shape_of, found.parts))) if parts else found.classes
    if len(classes) < 2 - parts:
        raise ValueError(
            "kind: expected clouds with labelled parts, got none in "
            f"{data.root}; use kind classification, or an .npz with part and parts"
            if parts
            else f"data.root: expected at least two classes, got {some(classes) or 'none'} in {data.root}; "
            "add others"
        )
    train, val, how = _splits(found, data)
    # By number in the set: the class in `classes`, and the parts it may have.
    meaning = [classes.index(name) if name in classes else -1 for name in found.classes]
    own = [[i for i, part in enumerate(found.parts) if shape_of(part) == name] for name in classes]
    skipped: list[dict[str, str]] = []
    shares = []
    for name, items in (("train", train), (data.val_split, val)):
        before = len(skipped)
        share = read_share(items, keep, meaning, own if parts else None, skipped)
        if not len(share):
            wrong = skipped[before:]
            got = f"{len(wrong)} that cannot, {wrong[0]['path']}: {wrong[0]['reason']}" if wrong else "none"
            raise ValueError(
                f"data.root: expected clouds that can be used in the split {name} of {data.root}, got {got}; "
                "check the files"
            )
        shares.append(share)
    return Clouds(found.title, how, classes, found.parts if parts else [], shares[0], shares[1], skipped)


def shape_of(part: str) -> str:
    """The class in "Class/part"."""
    return part.rpartition("/")[0]


def in_ball(xyz: np.ndarray) -> np.ndarray:
    """(n, 3) -> (n, 3) float32: minus the mean, over the largest distance from it.

    Raises:
        ValueError: there is only one place, or a coordinate is not finite.
    """
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"points of shape {xyz.shape} in place of (n, 3)")
    xyz = xyz.astype(np.float64)
    if bad := int((~np.isfinite(xyz)).any(1).sum()):
        raise ValueError(f"{bad} of {len(xyz)} points with coordinates that are not finite")
    if len(xyz) < 2:
        raise ValueError(f"{len(xyz)} points")
    if (xyz == xyz[0]).all():
        raise ValueError(f"all {len(xyz)} points in one place")
    xyz = xyz / np.abs(xyz).max()  # squares of numbers of any size stay finite
    xyz = xyz - xyz.mean(0)
    return (xyz / np.sqrt((xyz**2).sum(1).max())).astype(np.float32)


def _read(item: Item, meaning: list[int], own: list[list[int]] | None) -> tuple[np.ndarray, int, np.ndarray]:
    """points (n, 3) float32 in the unit ball, class, parts (n,), which are 0 where `own` is None."""
    if not 0 <= item.label < len(meaning):
        raise ValueError(f"class {item.label} is none of 0 to {len(meaning) - 1}")
    label = meaning[item.label]
    xyz, part = item.read()
    ball = in_ball(xyz)
    if own is None:
        return ball, label, np.zeros(len(ball), np.int64)
    if part is None or label < 0:
        raise ValueError("it has no parts")
    if part.shape != (len(ball),):
        raise ValueError(f"{len(ball)} points and parts of shape {part.shape}")
    if len(odd := np.setdiff1d(part, own[label])):
        raise ValueError(
            f"part {odd[0]} is none of its class, which has {some([str(i) for i in own[label]], 8)}"
        )
    return ball, label, part.astype(np.int64)


def read_share(
    items: list[Item],
    keep: int,
    meaning: list[int],
    own: list[list[int]] | None,
    skipped: list[dict[str, str]],
) -> Share:
    """The clouds that can be used, with at most `keep` points each, always the same ones.

    Args:
        meaning: which class an item's label stands for; -1: none.
        own: numbers of the parts that each class has; None: parts are not asked for.
        skipped: gets the path and the reason of the others.
    """
    read, names = [], []
    for item in items:
        try:
            xyz, label, part = _read(item, meaning, own)
        except Exception as error:  # each reader has its own
            skipped.append({"path": item.name, "reason": reason(error, item.name)})
            continue
        if len(xyz) > keep:
            chosen = np.random.default_rng(draw(0, "keep", item.name)).permutation(len(xyz))[:keep]
            xyz, part = xyz[np.sort(chosen)], part[np.sort(chosen)]
        read.append((torch.from_numpy(xyz), torch.from_numpy(part), label))
        names.append(item.name)
    return Share(
        torch.cat([torch.empty(0, 3), *(xyz for xyz, _, _ in read)]),
        torch.tensor([0, *(len(xyz) for xyz, _, _ in read)]).cumsum(0),
        torch.tensor([label for _, _, label in read], dtype=torch.int64),
        torch.cat([torch.empty(0, dtype=torch.int64), *(part for _, part, _ in read)]),
        names,
    )


def _splits(found: Set, data: PointData) -> tuple[list[Item], list[Item], str]:
    items = found.items
    if "all" in items:
        whole = items["all"]
        held = held_out(torch.tensor([item.label for item in whole]), [item.name for item in whole]).tolist()
        train = [item for item, out in zip(whole, held, strict=True) if not out]
        val = [item for item, out in zip(whole, held, strict=True) if out]
        how = "a fifth of every class, chosen by the hash of the name"
    else:
        there = [name for name, clouds in items.items() if clouds]
        if data.val_split not in there or "train" not in there:
            raise ValueError(
                f"data.val_split: expected train and a split to hold out of {data.root}, which has "
                f"{' and '.join(there) or 'none'}, got {data.val_split!r}; choose another"
            )
        if data.split == "trainval" and data.val_split == "val":
            raise ValueError(
                "data.val_split: expected test with data.split trainval, which learns from val, got 'val'; "
                "change one of them"
            )
        train = items["train"] + (items.get("val", []) if data.split == "trainval" else [])
        val, how = items[data.val_split], f"the split {data.val_split}"
    if data.train_clouds is not None:
        train = [train[i] for i in order(len(train), 0, 0)[: data.train_clouds].tolist()]
    if data.val_clouds is not None:
        val = [val[i] for i in order(len(val), 0, 0)[: data.val_clouds].tolist()]
    return train, val, how

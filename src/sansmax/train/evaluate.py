"""How good a network is on a split of labelled images, at one image size after another."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..tasks._data import Images, load_images
from ..tasks._data._decode import reason
from ..tasks._data.shards import decoded, read_shard, shard_list
from ..tasks._data.sources import workers
from ..tasks._data.split import is_sharded, open_split
from .checkpoint import read_json
from .network import Network, enough_memory, pick_device
from .recipe import Data, Recipe

__all__ = ["evaluate", "label_map", "open_labelled", "table"]

SHOWN = 3


# Of an image: the network's input, or why it cannot be read; the label; the name.
Item = tuple[Tensor | str, int, str]


class _Prepared(Dataset):
    """Items of a split."""

    def __init__(self, split: Any, transform: Any) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Item:
        name = self.split.name(index)
        try:
            image, label = self.split.picture(index)
            return self.transform(image), label, name
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
            return reason(error), -1, name


class _Streamed(IterableDataset):
    """Items of shards; every worker reads shards of its own."""

    def __init__(self, split: "_Shards", transform: Any) -> None:
        self.split, self.transform = split, transform

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        for path in self.split.paths[number::count]:
            for sample in read_shard(path):
                if isinstance(sample, tuple):
                    yield sample[1], -1, sample[0]
                    continue
                name = f"{Path(path).name}/{sample['__key__']}"
                try:
                    image, label = decoded(sample, self.split.num_classes)
                    yield self.transform(image), label, name
                except Exception as error:  # as above
                    yield reason(error), -1, name


class _Shards:
    """A split of WebDataset shards. Classes that are their own numbers have no names."""

    def __init__(self, data: Data) -> None:
        found = shard_list(data, data.split)
        self.paths, self.num_classes = found.paths, len(found.classes)
        numbers = list(map(str, range(self.num_classes)))
        self.classes = None if found.classes == numbers else found.classes


def evaluate(
    network: Network,
    split: Any,
    *,
    crop: float | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Top-1, top-5 and mean cross-entropy over all images that can be read, and top-1 of every class.

    Args:
        split: of open_labelled, or with len(split), split.classes, split.name(i) and split.picture(i) ->
            (RGB image, label).
        crop: share of the resized side that is kept; None: the network's.
        workers: processes that decode; 0: this one.
        device: auto, cpu or cuda.
        precision: fp32 or bf16 (autocast).

    Returns:
        Shares from 0 to 1; top5 is None where the network has no more than 5 classes, a class's top1 where it
        has no image. images_per_s counts reading, decoding and the network.

    Raises:
        ValueError: the classes do not fit, or no image can be read; see label_map.
    """
    if not network.num_classes:
        raise ValueError(f"network: expected classes, got {network.name}, which has none; give another")
    names, labels = label_map(network, split.classes)
    where = pick_device(device)
    model = network.model.to(where)
    size = network.num_classes
    counts = torch.zeros(2, size, dtype=torch.int64)  # images, and how many of them are right
    loss, top5, skipped = 0.0, 0, []
    prepare = _Streamed if isinstance(split, _Shards) else _Prepared
    prepared = prepare(split, network.transform(crop))
    loader = DataLoader(prepared, batch_size, num_workers=workers, collate_fn=list)
    start = time.perf_counter()
    for images, target in _batches(loader, skipped):
        if target.max() >= len(labels):
            raise ValueError(
                f"data: expected labels below {len(labels)}, got {int(target.max())}; give the data that "
                f"{network.name} was trained for"
            )
        images, target = images.to(where), torch.tensor(labels)[target].to(where)
        with (
            enough_memory(batch_size),
            torch.inference_mode(),
            torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            logits = model(images).float()
        top = logits.topk(min(5, size)).indices
        right = top == target[:, None]
        counts[0] += target.bincount(minlength=size).cpu()
        counts[1] += target[right[:, 0]].bincount(minlength=size).cpu()
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        top5 += int(right.sum())
    seconds = time.perf_counter() - start
    images = int(counts[0].sum())
    if not images:
        first = f" ({skipped[0]['path']}: {skipped[0]['reason']})" if skipped else ""
        raise ValueError(
            f"data: expected images that can be read, got {len(skipped)} that cannot{first}; check data.root "
            f"and data.split"
        )
    shown = sorted(set(labels))
    return {
        "img_size": network.img_size,
        "crop": crop or network.crop,
        "images": images,
        "top1": int(counts[1].sum()) / images,
        "top5": top5 / images if size > 5 else None,
        "loss": loss / images,
        "seconds": seconds,
        "images_per_s": images / seconds,
        "skipped": skipped,
        "classes": [
            {
                "name": names[i],
                "images": int(counts[0, i]),
                "top1": int(counts[1, i]) / int(counts[0, i]) if counts[0, i] else None,
            }
            for i in shown
        ],
    }


def label_map(network: Network, classes: list[str] | None) -> tuple[list[str], list[int]]:
    """Names of the network's classes, and which of them each label of the data stands for.

    Names decide where both are known; the data may lack some of the network's. A network of timm without
    names knows ImageNet's synsets when those are the names of the data. Otherwise labels stand for
    themselves.

    Raises:
        ValueError: the data have a class that the network does not know, or another number of classes.
    """
    size = network.num_classes
    own = network.classes
    subset = None if own else infer_imagenet_subset(network.model)
    if subset and classes:
        synsets = ImageNetInfo(subset).label_names()
        own = synsets if set(classes) <= set(synsets) else None
    if own and classes:
        place = {name: i for i, name in enumerate(own)}
        if unknown := [name for name in classes if name not in place]:
            raise ValueError(
                f"data: expected the classes of {network.name} ({_some(own)}), got {_some(unknown)} besides; "
                f"give the data that it was trained for"
            )
        return own, [place[name] for name in classes]
    if classes and len(classes) != size:
        raise ValueError(
            f"data: expected {size} classes, as {network.name} has, got {len(classes)} ({_some(classes)}); "
            f"give the data that it was trained for"
        )
    return own or classes or list(map(str, range(size))), list(range(size))


def open_labelled(what: str, data: Data, network: Network) -> tuple[Data, Any]:
    """The split data.split of data.root, or, where that is empty, the images that the run `what` held out.

    Returns:
        The data with every default filled in, and the split.
    """
    if not data.root:
        recipe = (
            read_json(Path(what).expanduser() / "recipe.json") if Path(what).expanduser().is_dir() else None
        )
        if recipe is None:
            raise ValueError(
                f"data.root: expected labelled images, got none, and {what} is no run folder that has its "
                f"own; give --data.root FOLDER"
            )
        data = Recipe.from_json(recipe["recipe"]).data
        data = dataclasses.replace(data, split=data.val_split)
    data = dataclasses.replace(
        data, workers=workers(data, 1), num_classes=data.num_classes or network.num_classes
    )
    if data.root == "digits" and not data.reader:
        return data, _Digits(load_images("digits", network.img_size))
    return data, _Shards(data) if is_sharded(data) else open_split(data, data.split)


class _Digits:
    """The held-out digits as a split."""

    def __init__(self, images: Images) -> None:
        self.images, self.classes = images, images.classes

    def __len__(self) -> int:
        return len(self.images.val_labels)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def picture(self, index: int) -> tuple[Image.Image, int]:
        pixels = Image.fromarray(self.images.val_images[index, 0].numpy())
        return pixels.convert("RGB"), int(self.images.val_labels[index])


def table(network: Network, rows: list[dict[str, Any]]) -> Table:
    """A row for every image size."""
    shown = Table(title=network.name, box=SIMPLE_HEAD, show_edge=False)
    for name in ("size", "top-1 %", "top-5 %", "loss", "images", "skipped", "images/s"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            str(row["img_size"]),
            f"{100 * row['top1']:.2f}",
            "-" if row["top5"] is None else f"{100 * row['top5']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['images']:,}",
            f"{len(row['skipped']):,}",
            f"{row['images_per_s']:,.0f}",
        )
    return shown


def _batches(loader: DataLoader, skipped: list[dict[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of the images that can be read; the others are noted."""
    for entries in loader:
        skipped += [{"path": name, "reason": x} for x, _, name in entries if isinstance(x, str)]
        if good := [(x, label) for x, label, _ in entries if not isinstance(x, str)]:
            images, labels = zip(*good, strict=True)
            yield torch.stack(images), torch.tensor(labels)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

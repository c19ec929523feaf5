"""WebDataset shards: streamed, shuffled, dealt out to processes and workers, with a position to go on from.

The order of a worker's images follows from the seed, the epoch, and its number among all workers of all
processes, so going on at an update means reading the shards anew and leaving out what was seen, undecoded.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ._decode import reason, to_rgb
from .batches import Batch, Noted, collated, evaluation_view, normalised, seeded, training_view
from .draws import Part, draw
from .settings import Augment, Data

__all__ = ["Shards", "read_shard", "shard_list"]

IMAGES = ("jpg", "jpeg", "png", "webp")
Failure = tuple[str, str]


@dataclass(frozen=True)
class ShardList:
    """Shards of a split in order, how many images they hold (None: not known), and the classes."""

    paths: list[str]
    count: int | None
    classes: list[str]


def shard_list(data: Data, split: str) -> ShardList:
    """The shards of a split.

    `split` is a pattern of names (train-{0000..0099}.tar, train-*.tar, with the count behind a | as in
    timm), or a name in root/_info.json, which is timm's: {"splits": {"train": {"num_samples": ...,
    "filenames": [...]}}, "classes": [...]}; without such a file the shards whose names begin with the
    split's.

    Raises:
        ValueError: no shards are there, or neither the classes nor their number is known.
    """
    from webdataset.shardlists import expand_urls

    root = Path(data.root).expanduser()
    info = _info(root)
    pattern, _, count = split.partition("|")
    known = info.get("splits", {}).get(pattern)
    total = int(count) if count else data.num_samples
    if known:
        names, total = known["filenames"], total or known.get("num_samples")
    elif "://" in pattern or pattern.startswith("pipe:"):
        names = expand_urls(pattern)
    else:
        wanted = [pattern] if ".tar" in pattern else _synonyms(pattern)
        names = next(filter(None, (_matching(root, name) for name in wanted)), [])
    paths = [name if "://" in name or name.startswith("pipe:") else str(root / name) for name in names]
    missing = [
        path for path in paths if "://" not in path and ":" not in path[:6] and not Path(path).is_file()
    ]
    if not paths or missing:
        raise ValueError(
            f"data.split: expected shards in {root} for {split!r}, got {missing[0] if missing else 'none'}"
            f"{' missing' if missing else ''}; give a pattern such as 'train-{{0000..0099}}.tar'"
        )
    classes = info.get("classes") or [str(i) for i in range(data.num_classes or 0)]
    if not classes:
        raise ValueError(
            f"data.num_classes: expected the number of classes, which no _info.json in {root} tells, got "
            "none; add --data.num-classes"
        )
    return ShardList(paths, total, list(classes))


def _info(root: Path) -> dict[str, Any]:
    path = root / "_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ValueError(
            f"data.root: expected JSON in {path}, got something else; mend or remove it"
        ) from None


def _synonyms(split: str) -> list[str]:
    held_out = ("validation", "val", "valid", "test", "eval")
    return [f"{name}*.tar" for name in (split, *(held_out if split in held_out else ()))]


def _matching(root: Path, pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if any(c in pattern for c in "*?["):
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
    return [str(name) for name in expand_urls(pattern)]


def read_shard(url: str) -> Iterator[dict[str, Any] | Failure]:
    """The samples of a shard as bytes by ending, with __key__; what cannot be read comes as (name, reason).

    A truncated shard gives what stands before the cut.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

    failures: list[Failure] = []

    def note(error: Exception) -> bool:
        failures.append((url, reason(error)))
        return True

    try:
        opened = url_opener([{"url": url}], handler=note)
        for sample in group_by_keys(tar_file_expander(opened, handler=note), handler=note):
            yield sample
            yield from failures
            failures.clear()
    except Exception as error:  # tarfile raises ReadError, EOFError, zlib.error and more
        note(error)
    yield from failures


def decoded(sample: dict[str, Any], classes: int) -> tuple[Image.Image, int]:
    """The image and the class of a sample: jpg, png or webp, and cls as text."""
    content = next((sample[kind] for kind in IMAGES if kind in sample), None)
    if content is None:
        raise ValueError(
            f"no image ({', '.join(IMAGES)}) in the sample, which has {', '.join(sorted(sample))}"
        )
    label = int(sample["cls"])
    if not 0 <= label < classes:
        raise ValueError(f"class {label} is not below {classes}")
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image), label


class _Stream(IterableDataset[Any]):
    """What one worker of one process reads: its own shards, again and again in training, each once
    otherwise."""

    def __init__(
        self, shards: ShardList, view: Callable[..., Any], buffer: int, reprob: float, name: str
    ) -> None:
        self.shards, self.view, self.buffer, self.reprob, self.name = shards, view, buffer, reprob, name
        self.epoch, self.first, self.part = 0, 0, Part(1)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        part = self.part
        if self.name != "train":
            for url in self.shards.paths[part.rank * count + number :: part.world * count]:
                yield from self._images(self._once(url), 0)
            return
        # The loader asks its workers in turn; after a break the turn begins elsewhere.
        worker = (number + self.first) % count
        seen = len(range(worker, self.first, count)) * part.piece
        yield from self._images(self._endless(part.rank * count + worker, part.world * count), seen)

    def _once(self, url: str) -> Iterator[Any]:
        yield from read_shard(url)

    def _endless(self, worker: int, workers: int) -> Iterator[Any]:
        from webdataset.filters import _shuffle

        turn = 0
        while True:
            order = list(self.shards.paths)
            random.Random(draw(self.part.seed, "shards", self.epoch, turn)).shuffle(order)
            # With fewer shards than workers several read the same one, shuffled otherwise.
            mine = order[worker::workers] or [order[worker % len(order)]]
            chance = random.Random(draw(self.part.seed, "buffer", self.epoch, turn, worker))
            items = (item for url in mine for item in read_shard(url))
            found = False
            for item in _shuffle(items, self.buffer, min(self.buffer, 1000), chance):
                found = found or isinstance(item, dict)
                yield item
            if not found:
                raise ValueError(
                    f"data: expected images in the shards {', '.join(mine[:3])}, got none; check them"
                )
            turn += 1

    def _images(self, items: Iterator[Any], seen: int) -> Iterator[Any]:
        failures: list[Failure] = []
        count = 0
        for item in items:
            if isinstance(item, tuple):
                failures.append(item)
                continue
            name = f"{Path(item['__url__']).name}/{item['__key__']}"
            count += 1
            if count <= seen:
                continue
            try:
                image, label = decoded(item, len(self.shards.classes))
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
                failures.append((name, reason(error)))
                continue
            seed = draw(self.part.seed, "view", self.epoch, self.part.rank, name, count)
            pixels, numbers = seeded(self.view, image, seed, self.reprob, [label, count - 1])
            yield pixels, numbers, failures
            failures = []
        if failures:
            yield None, [0] * 6, failures


class Shards:
    """Training and held-out images from shards; arguments as those of Files."""

    def __init__(
        self,
        data: Data,
        augment: Augment,
        size: tuple[int, int],
        crop: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int,
        device: torch.device,
    ) -> None:
        train, val = shard_list(data, data.split), shard_list(data, data.val_split)
        if not train.count:
            raise ValueError(
                "data.num_samples: expected the number of training images, which no _info.json tells, got "
                "none; add --data.num-samples, or write it behind the pattern: "
                f"'{data.split.partition('|')[0]}|50000'"
            )
        if augment.repeats > 1:
            raise ValueError(
                f"augment.repeats: expected 1 with shards, which are streamed, got {augment.repeats}; set "
                "it to 1"
            )
        self.title, self.classes, self.split = Path(data.root).name, train.classes, f"shards {data.val_split}"
        self.mean, self.std, self.device, self.workers = mean, std, device, workers
        self.train_size, self.val_size = train.count, val.count or 0
        self.skipped: list[dict[str, str]] = []
        view = training_view(augment, size, mean)
        self._train = _Stream(train, view, data.shuffle_buffer, augment.reprob, "train")
        self._val = _Stream(val, evaluation_view(size, crop, augment, mean), 1, 0.0, "validation")

    def train(self, epoch: int, update: int, part: Part) -> Iterator[Batch]:
        self._train.epoch, self._train.first, self._train.part = epoch, update * part.accumulate, part
        return self._batches(self._train, part.piece)

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        self._val.part = Part(2 * world, 1, rank, world)
        return self._batches(self._val, batch_size)

    def picture(self, position: int) -> None:
        return None

    def _batches(self, stream: _Stream, batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            stream,
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=collated,
            pin_memory=self.device.type == "cuda",
        )
        return normalised(Noted(loader, self.skipped), self.mean, self.std, self.device)

"""WebDataset shards: streamed, shuffled, dealt out to processes and workers, with a position to go on from.

The order of a worker's images follows from the seed, the epoch, and its number among all workers of all
processes, so going on at an update means reading the shards anew and leaving out what was seen, undecoded.
"""

import io
import itertools
import json
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ._decode import reason, to_rgb
from .batches import TRIES, Batch, Noted, collated, evaluation_view, normalised, seeded, training_view
from .draws import Part, draw
from .settings import Augment, Data
from .split import HELD_OUT_NAMES

__all__ = ["Shards", "read_shard", "shard_list"]

IMAGES = ("jpg", "jpeg", "png", "webp")
FAR = 10**9  # positions from a held-out shard to the next
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
    root = Path(data.root).expanduser().absolute()
    info = _info(root)
    pattern, _, count = split.partition("|")
    if count and not count.isdecimal():
        raise ValueError(
            f"data.split: expected the number of images behind the |, got {count!r} in {split!r}; write it "
            "as digits, or leave it out"
        )
    total = int(count) if count else data.num_samples if split == data.split else None
    splits = info.get("splits", {})
    known = next((splits[name] for name in _synonyms(pattern) if name in splits), None)
    if known:
        names, total = known["filenames"], total or known.get("num_samples")
    elif _remote(pattern):
        names = _expanded(pattern)
    else:
        wanted = [pattern] if ".tar" in pattern else [f"{name}*.tar" for name in _synonyms(pattern)]
        names = next(filter(None, (_matching(root, name) for name in wanted)), [])
    # A command (pipe:) is run where the user gives it, not where a file does.
    paths = [name if "://" in name or (_remote(name) and not known) else str(root / name) for name in names]
    missing = [path for path in paths if not _remote(path) and not Path(path).is_file()]
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
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        for known in info.get("splits", {}).values():
            iter(known["filenames"])
        return info
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f'data.root: expected {{"splits": {{name: {{"num_samples": count, "filenames": [...]}}}}, '
            f'"classes": [...]}} in {path}, got something else; mend or remove it'
        ) from None


def _synonyms(split: str) -> list[str]:
    return [split, *(HELD_OUT_NAMES if split in HELD_OUT_NAMES else ())]


def _remote(name: str) -> bool:
    return "://" in name or name.startswith("pipe:")


def _expanded(pattern: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ValueError(
            f"data: expected the package that reads shards to be installed, got none for {pattern}; pip "
            "install sansmax[data]"
        ) from None
    return [str(name) for name in expand_urls(pattern)]


def _matching(root: Path, pattern: str) -> list[str]:
    if any(c in pattern for c in "*?["):
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
    return _expanded(pattern)


def read_shard(url: str) -> Iterator[dict[str, Any] | Failure]:
    """The samples of a shard as bytes by ending, with __key__; what cannot be read comes as (name, reason).

    A truncated shard gives what stands before the cut.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    name = url if _remote(url) else Path(url).name
    failures: list[Failure] = []

    def note(error: Exception) -> bool:
        failures.append((name, reason(error, url)))
        return True

    def twice(error: Exception) -> bool:  # with words of webdataset behind the first
        return note(ValueError(str(error.args[0]).partition(" in tar file")[0]))

    try:
        with gopen(url) if _remote(url) else open(url, "rb") as stream:
            for sample in group_by_keys(_members(stream, url, note), handler=twice):
                yield sample
                yield from failures
                failures.clear()
    except OSError as error:
        note(error)
    yield from failures


class _Header(tarfile.TarInfo):
    """Of a member. tarfile itself takes damage between two members for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"the archive is damaged or cut off ({error})") from None


def _members(stream: Any, url: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Files of a tar as webdataset wants them, at last {}."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as opened:
            tar: Any = opened
            while (member := tar.next()) is not None:
                tar.members.clear()
                if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                    yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
    except Exception as error:  # tarfile raises ReadError, EOFError, zlib.error and more
        note(error)
    yield {}


def decoded(sample: dict[str, Any], classes: int) -> tuple[Image.Image, int]:
    """The image and the class of a sample: jpg, png or webp, and cls as text."""
    there = ", ".join(sorted(kind for kind in sample if not kind.startswith("__")))
    content = next((sample[kind] for kind in IMAGES if kind in sample), None)
    if content is None:
        raise ValueError(f"no image ({', '.join(IMAGES)}) in the sample, which has {there}")
    if "cls" not in sample:
        raise ValueError(f"no class (cls) in the sample, which has {there}")
    label = int(sample["cls"])
    if not 0 <= label < classes:
        raise ValueError(f"class {label} is none of 0 to {classes - 1}")
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image), label


@dataclass(eq=False)
class _Stream(IterableDataset[Any]):
    """What one worker of one process reads: its own shards, again and again in training, each once
    otherwise.

    In training an image that cannot be read is replaced by the next that can, so that a position in the
    stream is the same whether what is before it was decoded or left out.
    """

    shards: ShardList
    view: Callable[..., Any]
    buffer: int = 1
    reprob: float = 0.0
    training: bool = False
    epoch: int = 0
    first: int = 0
    part: Part = field(default_factory=lambda: Part(1))

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        part = self.part
        if not self.training:
            for shard in range(part.rank * count + number, len(self.shards.paths), part.world * count):
                yield from self._images(read_shard(self.shards.paths[shard]), 0, shard * FAR)
            return
        # The loader asks its workers in turn; after a break the turn begins elsewhere.
        worker = (number + self.first) % count
        seen = len(range(worker, self.first, count)) * part.piece
        yield from self._images(self._endless(part.rank * count + worker, part.world * count), seen, 0)

    def _endless(self, worker: int, workers: int) -> Iterator[Any]:
        from webdataset.filters import _shuffle

        turn, found = 0, True
        while True:
            order = list(self.shards.paths)
            random.Random(draw(self.part.seed, "shards", self.epoch, turn)).shuffle(order)
            # With fewer shards than workers several read the same one, shuffled otherwise; one whose shards
            # hold nothing tries all.
            mine = (order[worker::workers] or [order[worker % len(order)]]) if found else order
            chance = random.Random(draw(self.part.seed, "buffer", self.epoch, turn, worker))
            items = (item for url in mine for item in read_shard(url))
            before, found = found, False
            for item in _shuffle(items, self.buffer, min(self.buffer, 1000), chance):
                found = found or isinstance(item, dict)
                yield item
            if not (found or before):
                return
            turn += 1

    def _images(self, items: Iterator[Any], seen: int, start: int) -> Iterator[Any]:
        failures: list[Failure] = []
        count = missing = 0
        for item in items:
            if isinstance(item, tuple):
                failures.append(item)
                continue
            count += 1
            if count <= seen:
                continue
            name = f"{Path(item['__url__']).name}/{item['__key__']}"
            try:
                with warnings.catch_warnings():  # PIL warns of odd metadata in images that it reads well
                    warnings.simplefilter("ignore")
                    image, label = decoded(item, len(self.shards.classes))
                views = [
                    self._view(image, label, name, start + at) for at in range(count - missing - 1, count)
                ]
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
                failures.append((name, reason(error)))
                missing += self.training
                if missing == TRIES:
                    break
                continue
            missing = 0
            for pixels, numbers in views:
                yield pixels, numbers, failures
                failures = []
        if failures or self.training:
            yield None, [0] * 6, failures

    def _view(self, image: Image.Image, label: int, name: str, position: int) -> tuple[Any, list[int]]:
        seed = draw(self.part.seed, "view", self.epoch, self.part.rank, name, position)
        return seeded(self.view, image, seed, self.reprob, [label, position])


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
        self.title = Path(data.root).expanduser().resolve().name
        self.classes, self.split = train.classes, f"shards {data.val_split}"
        self.mean, self.std, self.device, self.workers = mean, std, device, workers
        self.train_size, self.val_size = train.count, val.count or 0
        self.skipped: list[dict[str, str]] = []
        view = training_view(augment, size, mean)
        self._train = _Stream(train, view, data.shuffle_buffer, augment.reprob, training=True)
        self._val = _Stream(val, evaluation_view(size, crop, augment, mean))

    def train(self, epoch: int, update: int, part: Part) -> Iterator[Batch]:
        stream = replace(self._train, epoch=epoch, first=update * part.accumulate, part=part)
        pieces = (self.train_size // part.batch_size - update) * part.accumulate
        loader = itertools.islice(self._loader(stream, part.piece), pieces)
        yield from self._batches(Noted(loader, self.skipped, self.title, part.piece))

    def val(self, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        loader = self._loader(replace(self._val, part=Part(2 * world, 1, rank, world)), batch_size)
        return self._batches(Noted(loader, self.skipped, self.split, some=world == 1))

    def picture(self, position: int) -> None:
        return None

    def _loader(self, stream: _Stream, batch_size: int) -> DataLoader[Any]:
        return DataLoader(
            stream,
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=collated,
            pin_memory=self.device.type == "cuda",
        )

    def _batches(self, batches: Noted) -> Iterator[Batch]:
        return normalised(batches, self.mean, self.std, self.device)

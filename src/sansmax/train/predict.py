"""Predictions for any number of images, in parts that outlive interruptions and that processes share."""

import contextlib
import itertools
import json
import os
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..tasks._data._decode import reason, to_rgb
from ..tiles import Unreadable, check_tiled, features_tiled
from ._inputs import Source, images_of, parts_of
from ._tables import Columns, Rows, format_of
from .checkpoint import prepare_folder, read_json, replace_file, write_json
from .network import Network, enough_memory, pick_device

__all__ = ["Outcome", "predict", "some_inputs"]


@dataclass(frozen=True)
class Outcome:
    """How a process left: the table with so many rows, or parts that other processes have yet to write."""

    images: int
    errors: int
    missing: int


def predict(
    network: Network,
    source: str,
    out: str | Path,
    *,
    top_k: int = 5,
    embeddings: bool = False,
    batch_size: int = 128,
    part_size: int = 4096,
    tile: int | None = None,
    scratch: Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    progress: Callable[[float, int], None] = lambda done, parts: None,
) -> Outcome:
    """Writes the `top_k` classes of every image of `source` to `out`, each image once.

    The work is cut into parts, listed when it is begun in the folder OUT.parts. Process RANK of WORLD_SIZE
    (torchrun's variables; the processes need not run at the same time) predicts the parts RANK,
    RANK + WORLD_SIZE, ... and writes each whole or not at all. Whoever finds all parts there joins them to
    OUT, writes the settings to OUT.json and removes the folder. Killed at any time and called again, it goes
    on with the parts that are missing; the number of processes may be another one then.

    Args:
        source: an image, a folder, a .tar, or shards as name-{0000..0099}.tar.
        out: a file that ends in .csv or .parquet.
        embeddings: add the input of the network's last layer.
        part_size: images of a part; a .tar is one part.
        tile: read every image at its own size, in tiles of that side; see sansmax.predict_tiled.
        scratch: the folder for the tiles' tokens.
        progress: is told the parts that are done, and all of them; of an image in tiles also fractions.

    Raises:
        ValueError, OSError: something is missing, out of range, not writable, or was begun with other
            settings; one sentence says what to do.
    """
    for name, value, least in [
        ("top_k", top_k, 0 if embeddings else 1),
        ("batch_size", batch_size, 1),
        ("part_size", part_size, 1),
    ]:
        if value < least:
            raise ValueError(
                f"{name}: expected a whole number of at least {least}, got {value}; leave it out"
            )
    out = Path(out).expanduser()
    table, where, (rank, world) = format_of(out), pick_device(device), _process()
    if not network.num_classes and not embeddings:
        raise ValueError(
            f"network: expected classes, got {network.name}, which has none; add --embeddings for its "
            f"features"
        )
    if tile is not None:
        check_tiled(network.model, tile, scratch)
    columns = Columns(min(top_k, network.num_classes), embeddings)
    settings = {
        "network": network.name,
        "weights": network.fingerprint,
        "input": _absolute(source),
        "top_k": columns.top_k,
        "embeddings": embeddings,
        "img_size": network.img_size,
        "crop": network.crop,
        "part_size": part_size,
        "tile": tile,
        "precision": precision,
    }
    work = _Work(out, settings)
    if work.finished():
        return work.outcome()
    network.model.to(where)
    try:
        work.begin(parts_of(source, part_size))
        count = work.count()
        with warnings.catch_warnings():  # PIL warns of odd metadata in images that it reads well
            warnings.simplefilter("ignore")
            own = len(range(rank, count, world))
            for number, part in work.parts(rank, world):
                if not work.part(number).exists() and not work.out.exists():
                    if tile is None:
                        batches = _predicted(network, part, columns, batch_size, where, precision)
                    else:
                        share = partial(_share_of_part, progress, number // world, own)
                        words = {"tile": tile, "scratch": scratch, "progress": share}
                        batches = _predicted_tiled(network, part, columns, words, where, precision)
                    replace_file(work.part(number), lambda path, b=batches: table.write(path, columns, b))
                progress(number // world + 1, own)
        if missing := work.missing(count):
            return Outcome(0, 0, missing)
        work.join(table, columns, count)
    except FileNotFoundError:
        if not work.finished():  # else another process joined the parts at the same time
            raise
    return work.outcome()


def some_inputs(network: Network, source: str, most: int) -> tuple[list[Tensor], list[dict[str, str]]]:
    """Inputs (1, in_chans, img_size, img_size) of at most `most` images of `source`, equally far apart in a
    folder, the first of shards; and the images that could not be read: path and reason.

    Raises:
        ValueError, OSError: there is no image that can be read.
    """
    parts = list(parts_of(source, 4096))
    files = [(name, Path(part["root"], name)) for part in parts for name in part.get("files", ())]
    images: Iterable[tuple[str, Source]] = files[:: max(1, -(-len(files) // most))]
    if not files:
        images = itertools.chain.from_iterable(map(images_of, parts))
    found, skipped = [], []
    for name, got in _decoded(itertools.islice(images, most), network.transform(), 64):
        if isinstance(got, str):
            skipped.append({"path": name, "reason": got})
        else:
            found.append(got[None])
    if not found:
        raise ValueError(
            f"input: expected an image that can be read in {source}, got none ({skipped[0]['path']}: "
            f"{skipped[0]['reason']}); check the files"
        )
    return found, skipped


class _Work:
    """The files of a call: OUT, OUT.json with its settings, and until then the folder OUT.parts."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out, self.settings = out, settings
        self.folder = out.with_name(f"{out.name}.parts")
        self.told = out.with_name(f"{out.name}.json")

    def finished(self) -> bool:
        """Whether OUT is there, made with these settings; what an interruption left behind is removed."""
        if not self.out.exists():
            return False
        self._check(read_json(self.told), self.out)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(self._fresh())
        for left in self.out.parent.iterdir():
            if left.name.startswith((self._hidden(), f".{self.told.name}-")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        return True

    def outcome(self) -> Outcome:
        """Of a table that is finished."""
        told = read_json(self.told)
        return Outcome(told["images"], told["errors"], 0)

    def begin(self, parts: Iterator[Any]) -> None:
        """Makes the folder with the list of parts, unless it was begun before or is by another process.

        The first part is asked for in any case: an input that has gone is refused.
        """
        first = next(parts)
        if not self.folder.exists():
            fresh = self._fresh()
            prepare_folder(fresh)
            try:
                with (fresh / "parts.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(part) + "\n" for part in itertools.chain([first], parts))
                write_json(fresh / "settings.json", self.settings)
                # The first of several processes wins: a folder with content is not replaced.
                with contextlib.suppress(OSError):
                    fresh.rename(self.folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        found = read_json(self.folder / "settings.json")
        if found is None and not self.folder.exists():
            raise FileNotFoundError(
                f"out: expected {self.folder}, which was there before, got nothing; run again"
            )
        self._check(found, self.folder)

    def parts(self, rank: int, world: int) -> Iterator[tuple[int, Any]]:
        """Numbers and contents of the parts of a process."""
        with (self.folder / "parts.jsonl").open(encoding="utf-8") as file:
            for number, line in itertools.islice(enumerate(file), rank, None, world):
                yield number, json.loads(line)

    def count(self) -> int:
        """Of all parts."""
        with (self.folder / "parts.jsonl").open(encoding="utf-8") as file:
            return sum(1 for _ in file)

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"{number:06d}{self.out.suffix}"

    def missing(self, count: int) -> int:
        """Parts that are not there yet."""
        return 0 if self.out.exists() else sum(not self.part(i).exists() for i in range(count))

    def join(self, table: Any, columns: Columns, count: int) -> None:
        """All parts into OUT, unless it is there."""
        if not self.out.exists():
            counted: list[int] = []

            def write(path: Path) -> None:
                counted[:] = table.join(path, columns, map(self.part, range(count)))
                told = {**self.settings, "images": counted[0], "errors": counted[1]}
                write_json(self.told, told)

            replace_file(self.out, write)
        self.finished()

    def _check(self, found: dict[str, Any] | None, where: Path) -> None:
        if found is None:
            raise FileExistsError(
                f"out: expected a free name or predictions to go on with, got {where} from elsewhere; remove "
                f"it or name another file with --out"
            )
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"out: expected {name} {found.get(name)!r}, with which {where} was begun, got {value!r}; "
                    f"use the same, remove it, or name another file with --out"
                )

    def _fresh(self) -> Path:
        """A temporary name of its own."""
        return self.out.with_name(f"{self._hidden()}{uuid.uuid4().hex}")

    def _hidden(self) -> str:
        """How the names of all temporary files and folders begin."""
        return f".{self.out.name}-"


def _predicted(
    network: Network, part: Any, columns: Columns, batch_size: int, device: torch.device, precision: str
) -> Iterator[Rows]:
    """Rows of a part, a batch at a time, in the order of the part."""
    labels = network.labels()
    decoded = _decoded(images_of(part), network.transform(), 2 * batch_size)
    while batch := list(itertools.islice(decoded, batch_size)):
        rows: Rows = [
            {"path": _text(name), "error": _text(got) if isinstance(got, str) else None}
            for name, got in batch
        ]
        inputs = [got for _, got in batch if not isinstance(got, str)]
        if inputs:
            with (
                enough_memory(batch_size),
                torch.inference_mode(),
                torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
            ):
                found = _forward(network.model, torch.stack(inputs).to(device), columns)
            _fill([row for row in rows if row["error"] is None], found, labels)
        yield rows


def _predicted_tiled(
    network: Network, part: Any, columns: Columns, words: dict[str, Any], device: torch.device, precision: str
) -> Iterator[Rows]:
    """Rows of a part, an image at a time, each read at its own size in tiles."""
    for name, source in images_of(part):
        row: dict[str, Any] = {"path": _text(name), "error": None}
        if isinstance(source, str):
            row["error"] = _text(source)
        else:
            try:
                with (
                    torch.inference_mode(),
                    torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
                ):
                    own = {"mean": network.mean, "std": network.std}
                    features = features_tiled(network.model, source, **own, **words)
                    _fill([row], _of_features(network.model, features, columns), network.labels())
            except Unreadable as error:
                row["error"] = _text(error.reason)
        yield [row]


def _share_of_part(
    progress: Callable[[float, int], None], number: int, parts: int, done: int, tiles: int
) -> None:
    progress(number + done / (tiles + 1), parts)


def _fill(rows: Rows, found: tuple[Any, Any, Any], labels: list[str]) -> None:
    """Into the rows of images what the network has found in them."""
    for row, index, share, embedding in zip(rows, *found, strict=True):
        for i, (k, p) in enumerate(zip(index, share, strict=True), 1):
            row[f"top{i}"], row[f"top{i}_probability"] = labels[k], p
        if embedding is not None:
            row["embedding"] = embedding


def _forward(model: Any, images: Tensor, columns: Columns) -> tuple[Any, Any, Any]:
    """Classes by falling probability, these, and embeddings, as lists of rows."""
    if columns.embeddings:
        return _of_features(model, model.forward_features(images), columns)
    return _ranked(model(images), [None] * len(images), columns)


def _of_features(model: Any, features: Tensor, columns: Columns) -> tuple[Any, Any, Any]:
    """The same, of what forward_head takes."""
    embeddings: Any = [None] * len(features)
    if columns.embeddings:
        embeddings = model.forward_head(features, pre_logits=True).float().flatten(1).cpu().numpy()
    return _ranked(model.forward_head(features) if columns.top_k else None, embeddings, columns)


def _ranked(logits: Tensor | None, embeddings: Any, columns: Columns) -> tuple[Any, Any, Any]:
    nothing: list[Any] = [[]] * len(embeddings)
    if logits is None:
        return nothing, nothing, embeddings
    share, index = logits.float().softmax(1).topk(columns.top_k)
    return index.tolist(), share.cpu().numpy(), embeddings


def _decoded(
    images: Iterator[tuple[str, Source]], transform: Callable[[Image.Image], Tensor], ahead: int
) -> Iterator[tuple[str, Tensor | str]]:
    """Inputs of the network, or why there is none, decoded by threads while the network works."""

    def load(source: Source) -> Tensor | str:
        if isinstance(source, str):
            return source
        try:
            with Image.open(source) as opened:
                return transform(to_rgb(opened))
        except Image.DecompressionBombError as error:
            return f"{reason(error)} Use --tile."
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
            return reason(error, source if isinstance(source, Path) else "")

    pending: deque[tuple[str, Future[Tensor | str]]] = deque()
    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    try:
        for name, source in images:
            pending.append((name, pool.submit(load, source)))
            if len(pending) > ahead:
                first, result = pending.popleft()
                yield first, result.result()
        while pending:
            first, result = pending.popleft()
            yield first, result.result()
    finally:  # Ctrl-C does not wait for the images that are left
        pool.shutdown(cancel_futures=True)


def _process() -> tuple[int, int]:
    """RANK and WORLD_SIZE of torchrun; no process waits for another, so that none is connected."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if all(word.isdecimal() for word in given) and int(given[0]) < int(given[1]):
        return int(given[0]), int(given[1])
    raise ValueError(
        f"RANK, WORLD_SIZE: expected a process and a larger number of them, got {given[0]!r} and "
        f"{given[1]!r}; unset them or start with torchrun"
    )


def _absolute(source: str) -> str:
    return source if "{" in source else str(Path(source).expanduser().resolve())


def _text(name: str) -> str:
    """As UTF-8 can write it; other bytes of a name as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

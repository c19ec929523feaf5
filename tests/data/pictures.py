"""Small images on disk: folders, archives and shards of them, and what is wrong with some."""

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from sansmax.tasks._data.batches import Batch
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.settings import Augment

CPU = torch.device("cpu")
STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
AUGMENT = Augment(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)  # draws from every generator


def noise(seed: int, size: tuple[int, int] = (13, 11)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, kind: str = "PNG", **words: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **words)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels and holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (13, 11)) -> Path:
    """Images root/name/0.png... for each name."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise(100 * number + i, size).save(root / name / f"{i}.png")
    return root


def tar(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def shards(root: Path, sizes: list[int], split: str = "train", suffix: str = ".tar") -> list[Path]:
    """Shards split-0000.tar... of so many images; all images of all shards differ, and have 3 classes."""
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{split}-{number:04d}{suffix}" for number in range(len(sizes))]
    seed = 0
    for path, size in zip(paths, sizes, strict=True):
        with webdataset.TarWriter(str(path)) as writer:
            for _ in range(size):
                seed += 1
                writer.write({"__key__": f"{split}{seed:04d}", "png": noise(seed), "cls": seed % 3})
    return paths


def told(batches: Any) -> list[list[torch.Tensor]]:
    """All that is in batches, to compare."""
    return [[b.images, b.labels, b.boxes, b.positions] for b in batches]


def same(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def united(pieces: list[list[Batch]], parts: list[Part]) -> list[torch.Tensor]:
    """The positions of each update's images, put together from the pieces of all processes."""
    accumulate, updates = parts[0].accumulate, len(pieces[0]) // parts[0].accumulate
    return [
        torch.cat([mine[u * accumulate + m].positions for mine in pieces for m in range(accumulate)])
        for u in range(updates)
    ]

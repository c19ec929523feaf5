"""From the settings to a source: which kind, and what is refused."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import CPU, STATISTICS, folder, noise, shards
from PIL import ImageOps

from sansmax.tasks._data import sources
from sansmax.tasks._data.batches import Files, InMemory
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.settings import Augment, Data
from sansmax.tasks._data.shards import Shards
from sansmax.tasks._data.sources import in_memory, open_source, workers

WHOLE = Augment(scale=(1.0, 1.0))


def source(root, augment=WHOLE, size=8, **words):
    return open_source(
        Data(**{"root": str(root), "workers": 0} | words), augment, size, 0.875, *STATISTICS, CPU
    )


@pytest.fixture
def photos(tmp_path):
    return folder(tmp_path / "photos", {"train/a": 4, "train/b": 5, "val/a": 2, "val/b": 1})


def test_the_digits():
    found = source("digits", size=None)
    assert isinstance(found, InMemory)
    assert (found.train_size, found.val_size, len(found.mean)) == (1352, 445, 1)
    assert source("digits", num_samples=100).train_size == 100
    assert source("digits", num_samples=10**6).train_size == 1352
    assert next(iter(source("digits", size=12).val(0, 1, 3))).images.shape == (3, 1, 12, 12)


@pytest.mark.parametrize(
    ("augment", "words", "kind"),
    [
        (WHOLE, {}, InMemory),
        (Augment(), {}, Files),
        (replace(WHOLE, auto_augment="rand-m9"), {}, Files),
        (replace(WHOLE, color_jitter=0.4), {}, Files),
        (Augment(), {"memory": True}, InMemory),
        (WHOLE, {"memory": False}, Files),
    ],
)
def test_what_is_kept_in_memory(photos, augment, words, kind):
    found = source(photos, augment, **words)
    assert type(found) is kind
    assert (found.train_size, found.val_size, found.classes) == (9, 3, ["a", "b"])
    assert next(iter(found.train(0, 0, Part(2)))).images.shape == (2, 3, 8, 8)


def test_how_much_is_kept_in_memory():
    data = Data()
    assert in_memory(data, WHOLE, 2**30)
    assert not in_memory(data, WHOLE, 2**30 + 1)
    assert in_memory(replace(data, memory=True), WHOLE, 2**40)


def test_images_in_memory_are_centre_squares(photos):
    found = source(photos)
    (batch,) = found.val(0, 1, 10)
    square = torch.from_numpy(np.array(ImageOps.fit(noise(200), (8, 8), 3))).permute(2, 0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (found.mean, found.std))
    assert (batch.images[0] - (square / 255 - mean) / std).abs().max() < 1e-5
    assert batch.labels.tolist() == [0, 0, 1]


def test_unreadable_images_are_no_part_of_what_is_in_memory(photos):
    (photos / "train" / "a" / "1.png").write_bytes(b"x")
    (photos / "val" / "b" / "0.png").write_bytes(b"x")
    found = source(photos)
    assert (found.train_size, found.val_size) == (8, 2)
    assert [entry["path"] for entry in found.skipped] == ["train/a/1.png", "val/b/0.png"]
    for i in range(2):
        (photos / "val" / "a" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"can be read in photos/validation, got none \(val/b/0.png: cannot ident"
    ):
        source(photos)


def test_an_archive_is_read_by_many_threads(tmp_path):
    from pictures import png, tar

    contents = {f"{c}/{i}.png": png(noise(i)) for c in ("a", "b") for i in range(100)}
    found = source(tar(tmp_path / "photos.tar", contents))
    assert (found.train_size, found.val_size, found.skipped) == (160, 40, [])


def test_shards_are_streamed(tmp_path):
    shards(tmp_path, [4, 4])
    shards(tmp_path, [2], "val")
    words = {"num_classes": 3, "num_samples": 8}
    assert isinstance(source(tmp_path, **words), Shards)
    with pytest.raises(
        ValueError, match=r"data.memory: expected none with shards, which are streamed, got True"
    ):
        source(tmp_path, **words, memory=True)


@pytest.mark.parametrize("words", [{"auto_augment": "rand-m9"}, {"color_jitter": 0.4}])
@pytest.mark.parametrize("root", ["digits", "photos"])
def test_what_images_in_memory_cannot_follow(photos, words, root):
    name = next(iter(words))
    with pytest.raises(
        ValueError, match=f"augment.{name}: expected none for images in memory, .* got .* leave"
    ):
        source(root if root == "digits" else photos, replace(WHOLE, **words), memory=True)


def test_too_many_images_for_memory(photos, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(sources.torch, "empty", full)
    with pytest.raises(
        ValueError, match=r"fit into memory, got 9 of 8 px in photos/train, .*smaller img_size"
    ):
        source(photos)


@pytest.mark.parametrize(
    ("root", "said"),
    [("none", "got nothing at"), ("file", "got a file at"), ("empty", "class folders in .*, got none")],
)
def test_no_folder(tmp_path, root, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=said):
        source(tmp_path / root)


def test_workers_by_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    assert [workers(Data(), processes) for processes in (1, 2, 3, 24)] == [8, 6, 4, 1]
    assert workers(Data(workers=0), 1) == 0
    assert workers(Data(workers=20), 4) == 20

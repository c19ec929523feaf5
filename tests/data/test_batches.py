"""Batches of files and of images in memory: any position again, bit for bit, whoever decodes."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import AUGMENT, CPU, STATISTICS, bomb, folder, noise, png, same, told, united
from PIL import Image

from sansmax.tasks._data import Images
from sansmax.tasks._data._decode import middle
from sansmax.tasks._data.batches import Decoded, Files, InMemory, erasing_box, evaluation_view, training_view
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.settings import Augment, Data
from sansmax.tasks._data.split import open_split

SIZE = (10, 12)
WHOLE = replace(AUGMENT, auto_augment="", shift=0.1)


def files(root, workers=0, augment=AUGMENT, **words):
    data = Data(root=str(root), **words)
    train = open_split(data, data.split)
    val = open_split(data, data.val_split, train.classes)
    return Files(train, val, data, augment, SIZE, 0.875, *STATISTICS, workers, CPU)


def in_memory(count=23, augment=WHOLE, limit=None):
    images = torch.randint(0, 256, (count + 5, 3, 7, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count + 5) % 3
    made = Images(
        "noise",
        ["a", "b", "c"],
        images[:count].to(torch.uint8),
        labels[:count],
        images[count:].to(torch.uint8),
        labels[count:],
        "the last five",
        True,
    )
    return InMemory(made, augment, CPU, limit)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """23 images to train with and 7 held out."""
    counts = {"train/a": 9, "train/b": 14, "val/a": 3, "val/b": 4}
    return folder(tmp_path_factory.mktemp("batches") / "photos", counts)


@pytest.fixture
def damaged(tmp_path):
    """Six of 23 images to train with and three of seven held out cannot be read, or not be changed."""
    root = folder(tmp_path, {"train/a": 9, "train/b": 14, "val/a": 3, "val/b": 4})
    for name, content in {
        "train/a/0.png": b"no image",
        "train/a/8.png": png(noise(0))[:150],
        "train/b/3.png": b"",
        "train/b/4.png": bomb(30000),
        "train/b/5.png": b"no image",
        "train/b/9.png": b"no image",
        "val/a/1.png": b"",
        "val/a/2.png": b"",
        "val/b/3.png": b"no image",
    }.items():
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_files_from_any_update_on(photos, workers):
    part = Part(6, 1, seed=3)
    whole = told(files(photos).train(2, 0, part))
    assert len(whole) == 3
    source = files(photos, workers)
    for update in range(4):
        assert same(told(source.train(2, update, part)), whole[update:])
    assert not same(told(source.train(1, 0, part)), whole)
    assert not same(told(source.train(2, 0, replace(part, seed=4))), whole)
    assert same(told(source.train(2, 0, part)), whole)


def test_images_in_memory_from_any_update_on():
    source, part = in_memory(), Part(4, 2, seed=3)
    whole = told(source.train(2, 0, part))
    assert len(whole) == 10
    for update in range(6):
        assert same(told(source.train(2, update, part)), whole[2 * update :])
    assert not same(told(source.train(1, 0, part)), whole)


def test_an_epoch_that_was_left_in_the_middle_leaves_no_trace(photos):
    source, part = files(photos, 2), Part(4)
    whole = told(files(photos).train(0, 0, part))
    begun = source.train(0, 0, part)
    next(begun)
    del begun
    assert same(told(source.train(0, 0, part)), whole)


@pytest.mark.parametrize("kind", ["files", "in memory"])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_processes_and_pieces_share_an_update_out(photos, kind, world, accumulate):
    source = files(photos) if kind == "files" else in_memory()
    parts = [Part(12, accumulate, rank, world, seed=5) for rank in range(world)]
    pieces = [list(source.train(1, 0, part)) for part in parts]
    (whole,) = source.train(1, 0, Part(12, seed=5))
    (shares,) = united(pieces, parts)
    assert torch.equal(shares.sort().values, whole.positions.sort().values)
    by_position = {int(p): image for p, image in zip(whole.positions, whole.images, strict=True)}
    for batch in (batch for some in pieces for batch in some):
        for position, image in zip(batch.positions, batch.images, strict=True):
            assert torch.equal(image, by_position[int(position)])


@pytest.mark.parametrize("kind", ["files", "in memory"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_shows_every_image_as_often_as_wanted(photos, kind, repeats):
    augment = Augment(repeats=repeats, shift=0.1)
    source = files(photos, augment=augment) if kind == "files" else in_memory(23, augment)
    found = torch.cat([batch.positions for batch in source.train(0, 0, Part(1))])
    assert len(found) == 23
    counts = found.bincount().bincount().tolist()
    assert counts == ([0, 23] if repeats == 1 else [counts[0], 0, 1, 7])
    first = next(iter(source.train(0, 0, Part(3))))
    assert len(first.positions.unique()) == 3 // repeats
    assert len(first.images.flatten(1).unique(dim=0)) == 3  # views of their own


@pytest.mark.parametrize("kind", ["files", "in memory"])
def test_held_out_images_come_once_and_in_order(photos, kind):
    for workers in (0, 2):
        source = files(photos, workers) if kind == "files" else in_memory()
        for world in (1, 2, 3):
            shares = [list(source.val(rank, world, 2)) for rank in range(world)]
            ranks = [torch.cat([b.positions for b in share]).tolist() for share in shares]
            assert ranks == [list(range(rank, source.val_size, world)) for rank in range(world)]


def test_a_held_out_image_is_that_of_timm(photos):
    source = files(photos)
    (batch,) = source.val(0, 1, 100)
    image, name = source.picture(5)
    assert name == "val/b/2.png"
    view = evaluation_view(SIZE, 0.875, AUGMENT, STATISTICS[0])
    pixels = torch.as_tensor(np.asarray(view(image))).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in STATISTICS)
    assert (batch.images[5] - (pixels - mean) / std).abs().max() < 1e-6
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.positions.tolist() == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_replaced_left_out_and_listed_once(damaged, workers):
    source, part = files(damaged, workers), Part(23)
    for _ in range(2):
        (batch,) = source.train(0, 0, part)
        # In their order (0, 1, 10, 11...) 0, 8, 16 to 18 and 22 are unreadable; each gives way to the next.
        shown = {1: 3, 9: 2, 19: 4} | dict.fromkeys([0, 8, 16, 17, 18, 22], 0)
        assert batch.positions.bincount(minlength=23).tolist() == [shown.get(i, 1) for i in range(23)]
        assert torch.equal(batch.labels, (batch.positions >= 9).long())
        (held_out,) = source.val(0, 1, 100)
        assert held_out.positions.tolist() == [0, 3, 4, 5]
    listed = {entry["path"]: entry["reason"] for entry in source.skipped}
    assert len(listed) == len(source.skipped) == 9
    assert listed.pop("train/b/4.png").startswith("Image size (900000000 pixels) exceeds limit")
    assert "truncated" in listed.pop("train/a/8.png")
    assert set(listed.values()) == {"cannot identify image file"}
    assert same(told(files(damaged).train(0, 0, part)), told(source.train(0, 0, part)))


class Failing:
    """A transform that cannot change images of one width."""

    def __init__(self, view):
        self.view = view

    def __call__(self, image):
        if image.width == 5:
            raise ZeroDivisionError("division by zero")
        return self.view(image)


def test_an_image_that_cannot_be_changed_is_replaced_too(photos):
    split = open_split(Data(root=str(photos)), "train")
    view = Failing(training_view(AUGMENT, SIZE, STATISTICS[0]))
    noisy = replace(split, reader=Narrow(split.reader))
    images = Decoded(noisy, view, substitute=True)
    _, numbers, failures = images[3, 0]
    assert numbers[1] == 4
    assert failures == [("train/a/3.png", "division by zero")]
    assert Decoded(noisy, view)[3, 0] == (None, [0] * 6, failures)


class Narrow:
    def __init__(self, reader):
        self.name, self._read = reader.name, reader.read

    def read(self, index):
        image, label = self._read(index)
        return (image.resize((5, 5)) if index == 3 else image), label


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [4, 130])
def test_where_nothing_can_be_read_one_sentence_says_so(tmp_path, workers, count):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count // 2):
            (tmp_path / name / f"{i}.png").write_bytes(b"x")
    source = files(tmp_path, workers)
    got = "100 in a row that cannot" if count == 130 else "none"
    said = rf"^data: expected images that can be read in .*/train, got {got} \(train/.*png: cannot identify"
    with pytest.raises(ValueError, match=said) as refused:
        next(source.train(0, 0, Part(2)))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"can be read in .*/validation, got none \(val/"):
        list(source.val(0, 1, 3))
    assert list(source.val(0, 2, 3)) == []


def test_odd_metadata_gives_no_warning(tmp_path):
    folder(tmp_path, {"val/a": 1, "val/b": 1, "train/a": 1, "train/b": 1})
    # From 89 million pixels on PIL warns.
    Image.new("1", (9500, 9500)).save(tmp_path / "train" / "a" / "0.png")
    source = files(tmp_path, augment=Augment())
    (batch,) = source.train(0, 0, Part(2))
    assert source.skipped == []
    assert batch.images.shape == (2, 3, *SIZE)


def test_a_very_long_image_is_not_scaled_whole():
    image = Image.new("RGB", (60000, 2))
    image.paste((255, 0, 0), (29995, 0, 30005, 2))
    assert middle(image).size == (32, 2)
    assert middle(image.rotate(90, expand=True)).size == (2, 32)
    assert middle(Image.new("RGB", (32, 2))).size == (32, 2)
    view = evaluation_view(SIZE, 0.875, AUGMENT, STATISTICS[0])
    assert (view(image)[0] == 255).all()


def test_fewer_images_than_there_are(photos):
    few = files(photos, num_samples=10)
    assert few.train_size == 10
    seen = [torch.cat([b.images for b in few.train(e, 0, Part(2))]) for e in range(2)]
    assert len(seen[0]) == 10
    names = {few._splits[0].name(i) for i in range(10)}
    assert len(names) == 10
    assert files(photos, num_samples=99).train_size == 23
    assert in_memory(limit=10).train_size == 10
    assert in_memory(limit=99).train_size == 23


def test_images_can_be_sent_to_another_process(photos):
    for split, view in [
        ("train", training_view(AUGMENT, SIZE, STATISTICS[0])),
        ("val", evaluation_view(SIZE, 0.875, AUGMENT, STATISTICS[0])),
    ]:
        images = Decoded(open_split(Data(root=str(photos)), split), view, 0.5)
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again[5, 7][0], images[5, 7][0])


def test_the_seed_of_a_view_is_all_that_it_depends_on(photos):
    view = training_view(AUGMENT, SIZE, STATISTICS[0])
    images = Decoded(open_split(Data(root=str(photos)), "train"), view, 0.5)
    first = images[3, 11]
    random.random(), np.random.rand(), torch.rand(1)
    again = images[3, 11]
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert len({images[3, seed][0].numpy().tobytes() for seed in range(8)}) == 8


def test_erasing_boxes_are_as_often_and_as_large_as_asked():
    chance = random.Random(0)
    boxes = torch.tensor([erasing_box(chance, 40, 60, 0.25) for _ in range(4000)])
    there = boxes[boxes[:, 2] > 0]
    assert len(there) / 4000 == pytest.approx(0.25, abs=0.03)
    assert (boxes[boxes[:, 2] == 0] == 0).all()
    top, left, height, width = there.unbind(1)
    assert (top + height).max() <= 40
    assert (left + width).max() <= 60
    assert min(top.min(), left.min()) == 0
    area, aspect = height * width / 2400, height / width
    assert 0.015 < area.min() < 0.03
    assert 0.30 < area.max() < 0.36
    # Uniform from 0.02 to 1/3, but for the boxes of which an edge is too long.
    assert area.mean() == pytest.approx(0.17, abs=0.015)
    assert 0.25 < aspect.min() < 0.35
    assert 2.2 < aspect.max() < 3.6
    assert aspect.log().median().abs() < 0.12
    assert erasing_box(chance, 1, 1, 1.0)[2:] == [0, 0]
    assert erasing_box(chance, 40, 60, 0.0) == [0, 0, 0, 0]

"""Segmentation: layouts of data as published, bad items, views."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from street_scenes import CPU, RUN, classes_in, data_of, mask, names, picture, streets, striped

from sansmax.tasks import segmentation
from sansmax.tasks._data.crops import crop
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.masks import IGNORED, open_scenes, values_of
from sansmax.tasks._windows import normalised


@pytest.fixture
def folder(tmp_path):
    return streets(tmp_path)


# Data.


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2007_000039", "2011_003271"):
        picture(root / "JPEGImages" / f"{name}.jpg", 20, 30)
    mask(root / "SegmentationClass" / "2007_000032.png", striped(20, 30, [0, 1, 15, 255]))
    mask(root / "SegmentationClass" / "2007_000039.png", striped(20, 30, [0, 20]))
    mask(root / "SegmentationClassAug" / "2007_000032.png", striped(20, 30, [0, 2]), "L")
    mask(root / "SegmentationClassAug" / "2011_003271.png", striped(20, 30, [0, 7]), "L")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000039\n")
    (lists / "trainaug.txt").write_text("2007_000032\n2011_003271\n")
    for given in (root, root.parent, tmp_path):
        train, val = open_scenes(data_of(given))
        assert (len(train.classes), train.classes[0], train.classes[20]) == (21, "background", "tvmonitor")
        assert classes_in(train) == [0, 1, 15, IGNORED]
        assert classes_in(val) == [0, 20]
    train, _ = open_scenes(data_of(root, split="trainaug"))
    assert [classes_in(train, i) for i in (0, 1)] == [[0, 2], [0, 7]]  # the masks of SBD
    line = "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png"
    (lists / "trainaug.txt").write_text(f"{line}\n")  # as EMANet's and others' lists
    train, _ = open_scenes(data_of(root, split="trainaug"))
    assert classes_in(train) == [0, 2]
    with pytest.raises(
        FileNotFoundError, match=r"expected a list at .*trainall\.txt, got none; there are train"
    ):
        open_scenes(data_of(root, split="trainall"))


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / "images" / split / f"{name}.jpg", 20, 30)
        mask(root / "annotations" / split / f"{name}.png", striped(20, 30, [0, 1, 150]), "L")
    train, val = open_scenes(data_of(tmp_path))
    assert (len(train.classes), train.classes[0]) == (150, "1")
    for scenes in (train, val):
        assert classes_in(scenes) == [0, 149, IGNORED]  # 0 is "other"
    rows = [f"{i}\t0.1\t1\t1\tname {i}, other name" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert open_scenes(data_of(root))[0].classes[149] == "name 150"


def test_folders_of_images_and_masks(tmp_path, folder):
    train, val = open_scenes(data_of(folder, ignore=11))
    assert (len(train), len(val), train.classes) == (6, 3, ["0", "1", "2"])
    assert classes_in(train) == [0, 1, 2, IGNORED]
    with pytest.raises(FileNotFoundError, match=r"of the split 'test' in .*, got train, trainannot, val"):
        open_scenes(data_of(folder, val_split="test"))
    moved = tmp_path / "moved"
    for split in ("train", "val"):
        (moved / "images").mkdir(parents=True, exist_ok=True)
        (moved / "masks").mkdir(exist_ok=True)
        (folder / split).rename(moved / "images" / split)
        (folder / f"{split}annot").rename(moved / "masks" / split)
    assert [len(s) for s in open_scenes(data_of(moved, ignore=11))] == [6, 3]
    nested = tmp_path / "nested"
    for split, other in (("train", "training"), ("val", "valid")):
        (nested / other).mkdir(parents=True)
        (moved / "images" / split).rename(nested / other / "images")
        (moved / "masks" / split).rename(nested / other / "labels")
    assert [len(s) for s in open_scenes(data_of(nested, ignore=11))] == [6, 3]
    (nested / "training").rename(tmp_path / "alone")  # images and masks without splits: a fifth is held out
    train, val = open_scenes(data_of(tmp_path / "alone", ignore=11))
    assert (len(train), len(val)) == (5, 1)
    assert not set(names(train)) & set(names(val))


def test_classes_of_a_folder(folder):
    given = data_of(folder, ignore=11, classes=("sky", "road", "tree", "car"))
    assert open_scenes(given)[0].classes == ["sky", "road", "tree", "car"]
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert open_scenes(data_of(folder, ignore=11))[0].classes == ["a", "b", "c"]
    train, _ = open_scenes(data_of(folder, ignore=1, classes=("sky", "void", "tree")))
    assert train.classes == ["sky", "tree"]  # the ignored value has no class
    (folder / "classes.txt").unlink()
    for path in folder.glob("*annot/*"):
        mask(path, striped(37, 50, [0, 255]), "L")
    with pytest.raises(
        ValueError, match=r"expected 2 to 254 classes, got 1 \(0\) from the masks of .*data.ignore"
    ):
        open_scenes(data_of(folder))
    train, _ = open_scenes(data_of(folder, ignore=-1))
    assert (train.classes, classes_in(train)) == (["0", "255"], [0, 1])


def test_bad_items_are_left_out_and_listed(folder):
    mask(folder / "trainannot" / "0.png", striped(30, 50, [0, 1]), "L")
    mask(folder / "trainannot" / "1.png", striped(37, 50, [0, 77]), "L")
    (folder / "trainannot" / "2.png").unlink()
    (folder / "train" / "3.png").write_bytes(b"no image")
    Image.new("RGB", (50, 37)).save(folder / "trainannot" / "4.png")
    (folder / "valannot" / "2.png").unlink()
    mask(folder / "valannot" / "9.png", striped(37, 50, [0, 1]), "L")
    recipe = replace(RUN, data=data_of(folder, ignore=11, classes=("a", "b", "c")))
    task = segmentation.open_task(recipe, CPU)
    # Training goes on with those that can be read, and every batch is full.
    shapes = [x.shape for x, _ in task.train_batches(0, 0, Part(2))]
    assert shapes == [(2, 3, 32, 32)] * 3
    assert sum(len(batch) for batch in task.val_batches(0, 1, 2)) == 2
    found = {entry["path"]: entry["reason"] for entry in task.skipped}
    assert found == {
        "train/0.png": "mask of 50x30 pixels, image of 50x37",
        "train/1.png": "value 77 in its mask is no class",
        "train/2.png": "no mask of that name",
        "train/3.png": "cannot identify image file",
        "train/4.png": "its mask: expected one channel of class numbers, got RGB",
        "val/2.png": "no mask of that name",
        "valannot/9.png": "no image of that name",
    }


def test_nothing_but_bad_items_is_one_sentence(folder):
    for path in folder.glob("train/*"):
        path.write_bytes(b"no image")
    task = segmentation.open_task(replace(RUN, data=data_of(folder, ignore=11)), CPU)
    with pytest.raises(ValueError, match=r"expected images that can be read in streets train, got none"):
        next(task.train_batches(0, 0, Part(2)))
    with pytest.raises(NotADirectoryError, match=r"data.root: expected a folder, got nothing at nowhere"):
        open_scenes(data_of("nowhere"))


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_modes_of_masks(tmp_path, mode):
    path, values = tmp_path / "mask.png", np.array([[0, 1, 1], [1, 0, 0]])
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif mode == "1":
        Image.fromarray(values.astype(bool)).save(path)
    else:
        mask(path, values, mode)
    assert np.array_equal(values_of(path), values)


# Views.


def test_a_view_is_the_image_and_its_mask_moved_alike():
    """Every pixel holds its own class as its colour."""
    values = np.random.default_rng(0).integers(0, 9, (11, 13)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    image = np.stack([values * 20] * 3, 2)
    mean, std = normalised(torch.zeros(3, 1, 1, dtype=torch.uint8)), 20 * (1 / 255)
    seen = set()
    for seed in range(60):
        pixels, classes = crop(image, values, (70, 120), (0.5, 2.0), 0.5, seed)
        assert (pixels.shape, classes.shape) == ((3, 70, 120), (70, 120))
        outside = classes == IGNORED
        assert (pixels[:, outside] == 0).all()  # 0 after the normalisation
        seen.add((outside.any(1).all().item(), outside.any(0).all().item()))
        if outside.any():
            row, column = (~outside).any(1).sum(), (~outside).any(0).sum()
            assert outside[row:].all() or row == 70
            assert outside[:, column:].all() or column == 120 or seed  # mirrored ones are padded on the left
        found = ((pixels[0] - mean[0]) / (std / 0.229)).round()
        assert ((found == classes) | outside).float().mean() > 0.6  # bilinear between two squares
    assert len(seen) > 1


def test_views_follow_from_the_seed_alone(folder):
    task = segmentation.open_task(replace(RUN, data=data_of(folder, ignore=11)), CPU)
    whole = list(task.train_batches(1, 0, Part(2, seed=3)))
    rest = list(task.train_batches(1, 1, Part(2, seed=3)))
    assert len(whole) == 3
    for (x, y), (u, v) in zip(whole[1:], rest, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    other = next(task.train_batches(2, 0, Part(2, seed=3)))
    assert not torch.equal(other[0], whole[0][0])
    halves = [next(task.train_batches(1, 0, Part(4, rank=r, world=2, seed=3)))[0] for r in (0, 1)]
    both = next(task.train_batches(1, 0, Part(4, seed=3)))[0]
    assert torch.equal(torch.cat(halves).sum(0), both[[0, 3, 1, 2]].sum(0))

"""Labelled images: the digits, and what an image folder may look like."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sansmax.tasks._data import folder as folder_module
from sansmax.tasks._data import load_images
from sansmax.tasks._data._decode import decode
from sansmax.tasks._data.batches import InMemory
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.settings import Augment
from sansmax.tasks._data.views import views
from sansmax.tasks.classification import Classification

PHOTOS = Augment(scale=(0.35, 1.0))
DIGITS = Augment(scale=(1.0, 1.0), shift=1 / 16, hflip=0.0)


def picture(seed=0, size=(13, 11), mode="RGB"):
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def make_class(root, name, count, suffix=".png"):
    (root / name).mkdir(parents=True)
    for i in range(count):
        picture(i + sum(name.encode())).save(root / name / f"{name}_{i}{suffix}")


@pytest.fixture
def photos(tmp_path):
    """Two classes of 7 and 11 images, without a split."""
    make_class(tmp_path / "photos", "cat", 7)
    make_class(tmp_path / "photos", "dog", 11, ".jpg")
    return tmp_path / "photos"


def test_digits_are_split_by_class_and_never_overlap():
    data = load_images()
    assert data.train_images.shape == (1352, 1, 8, 8)
    assert data.val_images.shape == (445, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.max() == 255
    shares = data.val_labels.bincount() / (data.train_labels.bincount() + data.val_labels.bincount())
    assert ((shares - 0.25).abs() < 0.01).all()
    rows = torch.cat([data.train_images, data.val_images]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert load_images(img_size=16).val_images.shape == (445, 1, 16, 16)


def test_mean_and_deviation_are_those_of_the_training_images():
    data = load_images()
    mean, std = data.mean_std()
    values = data.train_images.double() / 255
    assert mean.item() == pytest.approx(values.mean().item(), rel=1e-6)
    assert std.item() == pytest.approx(values.std(correction=0).item(), rel=1e-6)


def test_an_automatic_split_depends_on_names_alone(photos, tmp_path):
    data = load_images(str(photos), 9)
    assert data.classes == ["cat", "dog"]
    assert data.train_images.shape == (6 + 9, 3, 9, 9)
    assert data.val_labels.tolist() == [0, 1, 1]
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    again = load_images(str(moved), 9)
    assert torch.equal(again.val_images, data.val_images)
    # An image more, the first by name, moves none of the others.
    picture(99).save(moved / "dog" / "another.png")
    assert torch.equal(load_images(str(moved), 9).val_images, data.val_images)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val"])
def test_a_given_split_is_kept(tmp_path, name):
    for part, count in (("train", 3), (name, 2)):
        for label in ("cat", "dog"):
            make_class(tmp_path / part, label, count)
    data = load_images(str(tmp_path), 9)
    assert (len(data.train_labels), len(data.val_labels)) == (6, 4)
    assert data.split == f"the folders train and {name}"


def test_train_alone_is_split(tmp_path):
    for label in ("cat", "dog"):
        make_class(tmp_path / "train", label, 5)
    data = load_images(str(tmp_path), 9)
    assert (len(data.train_labels), len(data.val_labels)) == (8, 2)


def test_what_cannot_be_decoded_is_skipped_with_a_reason(photos):
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    (photos / "dog" / "empty.jpg").touch()
    whole = (photos / "dog" / "dog_0.jpg").read_bytes()
    (photos / "dog" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    data = load_images(str(photos), 9)
    assert len(data.train_labels) + len(data.val_labels) == 18
    assert [entry["path"] for entry in data.skipped] == [
        "cat/broken.png",
        "dog/empty.jpg",
        "dog/truncated.jpg",
    ]
    assert all(entry["reason"] and str(photos) not in entry["reason"] for entry in data.skipped)


def test_hidden_files_other_files_and_sub_folders(photos):
    (photos / ".cache").mkdir()
    (photos / "cat" / ".hidden.png").write_bytes(b"x")
    (photos / "cat" / "notes.txt").write_text("x")
    (photos / "notes.txt").write_text("x")
    make_class(photos / "cat", "kittens", 2)
    data = load_images(str(photos), 9)
    assert data.classes == ["cat", "dog"]
    assert len(data.train_labels) + len(data.val_labels) == 20
    assert data.skipped == []


def save(tmp_path, image, suffix=".png", **options):
    path = tmp_path / f"one{suffix}"
    image.save(path, **options)
    return path


def test_modes_become_rgb(tmp_path):
    grey = decode(save(tmp_path, picture(mode="L")), 7)
    assert grey.shape == (3, 7, 7)
    assert (grey[0] == grey[2]).all()
    for mode in ("1", "P", "LA", "RGBA"):
        assert decode(save(tmp_path, picture(mode=mode)), 7).shape == (3, 7, 7)
    assert decode(save(tmp_path, picture(mode="CMYK"), ".jpg"), 7).shape == (3, 7, 7)


def test_transparency_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (9, 9), (10, 20, 30, 0))
    assert (decode(save(tmp_path, clear), 5) == 255).all()
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert decode(save(tmp_path, palette, transparency=0), 5)[:, 0, 0].tolist() == [200, 100, 50]
    assert (decode(save(tmp_path, palette, transparency=1), 5) == 255).all()


@pytest.mark.parametrize(
    ("values", "suffix", "expected"),
    [
        (np.full((9, 9), 32896, np.uint16), ".png", 128),
        (np.full((9, 9), 200, np.uint16), ".png", 1),
        (np.full((9, 9), 32896, np.int32), ".tiff", 128),
        (np.full((9, 9), 0.5, np.float32), ".tiff", 128),
        (np.full((9, 9), np.nan, np.float32), ".tiff", 0),
    ],
)
def test_more_than_eight_bits(tmp_path, values, suffix, expected):
    assert (decode(save(tmp_path, Image.fromarray(values), suffix), 5) == expected).all()


def test_the_centre_is_kept_upright(tmp_path):
    wide = np.zeros((9, 27, 3), np.uint8)
    wide[:, 9:18] = 255
    assert (decode(save(tmp_path, Image.fromarray(wide)), 9) == 255).all()
    # Orientation 6: the camera was turned; the left edge of the file is the top of the picture.
    left = np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(save(tmp_path, Image.fromarray(left), exif=exif), 16)
    assert (upright[:, :8] == 255).all()
    assert (upright[:, 8:] == 0).all()


def test_a_very_long_image_takes_no_memory(tmp_path):
    assert decode(save(tmp_path, Image.new("RGB", (60000, 2), "red")), 64).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({}, r"expected at least two class folders in .*, got none; lay it out as"),
        ({"cat": 3}, r"expected at least two class folders in .*, got only 'cat'"),
        (
            {"cat": 3, "dog": 1},
            r"expected at least 2 readable images in every class .*, got 'dog' with 1; add",
        ),
        ({"cat": 3, "dog": 0}, r"got 'dog' with 0"),
        ({"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/cow": 2}, r"same classes, got cow, dog in only"),
        ({"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 0}, r"at least 1 readable .*'dog' with 0"),
    ],
)
def test_a_folder_that_will_not_do(tmp_path, layout, said):
    for name, count in layout.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path))


def test_all_images_corrupt(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"got 'cat' with 0, 'dog' with 0 \(6 files could not be decoded, cat/0"
    ):
        load_images(str(tmp_path))


def test_a_missing_or_unreadable_folder(tmp_path, monkeypatch):
    with pytest.raises(NotADirectoryError, match="expected an image folder, got nothing at"):
        load_images(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="got a file at"):
        load_images(str(tmp_path / "file"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder_module.Path, "iterdir", refuse)
    with pytest.raises(
        PermissionError, match="expected a folder that can be read, got 'Permission denied' at"
    ):
        load_images(str(tmp_path))


def test_an_unreadable_class_folder(photos, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(folder_module.os, "walk", walk)
    with pytest.raises(PermissionError, match=r"'Permission denied' at .*cat"):
        load_images(str(photos))


def test_too_many_images_for_memory(photos, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(folder_module.torch, "empty", full)
    with pytest.raises(ValueError, match=r"fit into memory, got 18 of 64 px .*smaller img_size"):
        load_images(str(photos))


def chance(count, seed=0):
    return torch.rand(5, count, generator=torch.Generator().manual_seed(seed))


def test_views_are_drawn_from_the_chances_alone():
    images = torch.rand(5, 3, 11, 11)
    black = torch.full((3, 1, 1), -2.0)
    seen = [views(images, PHOTOS, chance(5, seed), black) for seed in (3, 3, 7)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert seen[0].min() >= 0  # a crop lies inside the photo
    assert seen[0].max() <= 1


def test_every_other_photo_is_mirrored():
    images = torch.linspace(0, 1, 11).expand(200, 1, 11, 11)
    seen = views(images, PHOTOS, chance(200), torch.zeros(1, 1, 1))
    mirrored = (seen[..., 0] > seen[..., -1]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_digits_are_shifted_by_at_most_half_a_pixel_and_never_mirrored():
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, :, 1] = 1.0
    seen = views(images, DIGITS, chance(64), torch.zeros(1, 1, 1))
    assert not torch.equal(seen, images)
    assert seen[..., 3:].abs().max() < 1e-6
    assert (
        seen[..., 1:2].min() >= 0.25 - 1e-6
    )  # half a pixel in both directions leaves a quarter in the corner


def test_the_task_normalises_and_counts():
    data = load_images()
    task = Classification(InMemory(data, DIGITS, torch.device("cpu")), DIGITS)
    (batch,) = task.val_batches(0, 1, 500)
    assert batch.images.mean().abs() < 0.05
    assert (batch.images.std() - 1).abs() < 0.05
    logits = torch.nn.functional.one_hot(batch.labels, 10).float()
    logits[:100] = logits[:100].roll(1, 1)
    verdicts = task.verdict(logits, batch)
    assert verdicts.shape == (task.val_size, 4 + 2 * 5)
    assert (verdicts[:, 1] == verdicts[:, 4]).double().mean().item() == pytest.approx(345 / 445)
    x, y = next(task.train_batches(0, 0, Part(5)))
    assert x.shape == (5, 1, 8, 8)
    position = next(task.source.train(0, 0, Part(5))).positions
    assert torch.equal(y, data.train_labels[position])


def test_pictures_survive_a_round_trip_through_memory():
    file = io.BytesIO()
    picture(3, (9, 9)).save(file, "PNG")
    assert torch.equal(decode(file, 9), torch.from_numpy(np.array(picture(3, (9, 9)))).permute(2, 0, 1))

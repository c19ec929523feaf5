"""Splits: which images a folder, an archive or a library's set gives, and what is refused."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm.data.dataset_factory
from pictures import bomb, folder, noise, png, tar
from PIL import Image

from sansmax.tasks._data.settings import Data
from sansmax.tasks._data.split import is_sharded, open_split


def names(data, split, classes=None):
    found = open_split(data, split, classes)
    return [found.name(i) for i in range(len(found))]


def both(root, **words):
    """Names of the training and of the held-out images; they are all there is, and none is both."""
    data = Data(root=str(root), **words)
    train, val = (names(data, split) for split in (data.split, data.val_split))
    assert not {*train} & {*val}
    return train, val


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val"])
def test_a_folder_with_both_parts(tmp_path, name):
    folder(tmp_path, {"train/cat": 3, "train/dog": 2, f"{name}/cat": 2, f"{name}/dog": 1})
    train, val = both(tmp_path)
    assert train == [
        "train/cat/0.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/dog/0.png",
        "train/dog/1.png",
    ]
    assert val == [f"{name}/cat/0.png", f"{name}/cat/1.png", f"{name}/dog/0.png"]


@pytest.mark.parametrize("above", ["", "train/"])
def test_a_fifth_is_held_out_where_nothing_is(tmp_path, above):
    folder(tmp_path, {f"{above}cat": 5, f"{above}dog": 10})
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (12, 3)
    assert [sum("cat" in name for name in part) for part in (train, val)] == [4, 1]
    assert train == names(Data(root=str(tmp_path)), "train")


def test_parts_of_other_names_are_whole(tmp_path):
    folder(tmp_path, {"fold1/cat": 5, "fold1/dog": 5, "fold2/cat": 5, "fold2/dog": 5})
    train, val = both(tmp_path, split="fold1", val_split="fold2")
    assert (len(train), len(val)) == (10, 10)
    assert len(names(Data(root=str(tmp_path), split="fold2", val_split="fold2"), "fold2")) == 10
    with pytest.raises(ValueError, match=r"expected a folder of .*, got 'fold3'; it holds fold1, fold2"):
        both(tmp_path, split="fold3")


def test_only_a_held_out_folder(tmp_path):
    folder(tmp_path, {"val/cat": 2, "val/dog": 2})
    assert len(names(Data(root=str(tmp_path), split="val"), "val")) == 4


def test_classes_that_are_called_as_parts_are(tmp_path):
    folder(tmp_path, {"valid": 5, "invalid": 5})
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (8, 2)
    assert open_split(Data(root=str(tmp_path)), "train").classes == ["invalid", "valid"]


def test_labels_count_in_the_order_of_the_training_classes(tmp_path):
    folder(tmp_path, {"train/ant": 2, "train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    data = Data(root=str(tmp_path))
    train = open_split(data, "train")
    val = open_split(data, "validation", train.classes)
    assert val.classes == ["ant", "cat", "dog"]
    assert [val.picture(i)[1] for i in range(2)] == [1, 2]
    folder(tmp_path, {"val/emu": 1})
    with pytest.raises(ValueError, match=r"expected classes that the network knows in .*, got emu besides"):
        open_split(data, "validation", train.classes)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"train/cat": 2, "train/dog": 0, "val/cat": 1, "val/dog": 1}, "got none of 'dog'; add images"),
        ({"cat": 3, "dog": 1}, "besides those held out, got none of 'dog'"),
        ({"cat": 3}, "at least two class folders in .*, got only 'cat'"),
        ({}, "at least two class folders in .*, got none"),
    ],
)
def test_a_class_without_images(tmp_path, counts, said):
    folder(tmp_path, counts)
    with pytest.raises(ValueError, match=said):
        open_split(Data(root=str(tmp_path)), "train")


def test_a_held_out_class_may_be_empty_but_not_all(tmp_path):
    folder(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 0})
    data = Data(root=str(tmp_path))
    assert len(open_split(data, "validation")) == 1
    (tmp_path / "val" / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"expected images in .*/validation, got none; check data.root"):
        open_split(data, "validation")


def test_paths_links_and_files_of_other_kinds(tmp_path, monkeypatch):
    root = folder(tmp_path / "Größe und Maß" / "猫 犬", {"Käfer gelb": 3, "b": 3})
    folder(tmp_path / "elsewhere", {"deep": 2})
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "b" / "notes.txt").write_text("x")
    (root / "b" / "._0.png").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    train, val = both("~/Größe und Maß/猫 犬")
    assert sorted(train + val) == sorted(
        [f"Käfer gelb/{i}.png" for i in range(3)]
        + [f"b/{i}.png" for i in range(3)]
        + ["b/gone.png", "outside/deep/0.png", "outside/deep/1.png"]
    )
    found = open_split(Data(root="~/Größe und Maß/猫 犬"), "train")
    position = next(i for i in range(len(found)) if found.name(i).startswith("Käfer"))
    assert found.picture(position)[0].size == (13, 11)


def test_images_of_every_kind_are_rgb(tmp_path):
    folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 0, "val/b": 1})
    kinds = {
        "bits.png": png(Image.fromarray(np.full((9, 7), 32896, np.uint16))),
        "cmyk.jpg": png(noise(1).convert("CMYK"), "JPEG"),
        "grey.png": png(noise(1).convert("L")),
        "one.png": png(noise(1, (1, 1))),
    }
    for name, content in kinds.items():
        (tmp_path / "val" / "a" / name).write_bytes(content)
    found = open_split(Data(root=str(tmp_path)), "val")
    for i, size in enumerate([(7, 9), (13, 11), (13, 11), (1, 1)]):
        image, label = found.picture(i)
        assert (image.mode, image.size, label) == ("RGB", size, 0)
    assert found.picture(0)[0].getpixel((0, 0)) == (128, 128, 128)


def test_an_image_that_claims_a_billion_pixels_is_refused_at_once(tmp_path):
    folder(tmp_path, {"val/a": 1, "val/b": 1})
    (tmp_path / "val" / "a" / "0.png").write_bytes(bomb(30000))
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
        open_split(Data(root=str(tmp_path)), "val").picture(0)


def archive(path, names):
    return tar(path, {name: png(noise(i)) for i, name in enumerate(names)})


@pytest.mark.parametrize("above", ["", "./", "photos/"])
def test_an_archive_without_parts(tmp_path, above):
    path = archive(
        tmp_path / "photos.tar", [f"{above}{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]
    )
    train, val = both(path)
    assert (len(train), len(val)) == (16, 4)
    found = open_split(Data(root=str(path)), "train")
    assert found.classes == ["cat", "dog"]
    image, label = found.picture(0)
    assert np.array_equal(image, noise(int(found.name(0)[-5])))
    assert label == 0


def test_an_archive_with_parts_or_one_of_them(tmp_path):
    inside = [f"{part}/{c}/{i}.png" for part in ("train", "val") for c in ("cat", "dog") for i in range(5)]
    train, val = both(archive(tmp_path / "both.tar", inside))
    assert (sorted(train), sorted(val)) == (inside[:10], inside[10:])
    train, val = both(archive(tmp_path / "one.tar", inside[:10]))
    assert (len(train), len(val)) == (8, 2)
    with pytest.raises(ValueError, match=r"expected a folder of .*one.tar, got 'fold'; it holds train"):
        both(tmp_path / "one.tar", split="fold")


def test_an_archive_is_read_by_threads_and_forked_processes(tmp_path):
    path = archive(tmp_path / "photos.tar", [f"{c}/{i:02}.png" for c in ("cat", "dog") for i in range(20)])
    found = open_split(Data(root=str(path)), "train")
    alone = [np.array(found.picture(i)[0]) for i in range(len(found))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: np.array(found.picture(i % 32)[0]), range(320)))
    assert all(np.array_equal(image, alone[i % 32]) for i, image in enumerate(together))


def test_archives_in_an_archive(tmp_path):
    for c in ("cat", "dog"):
        archive(tmp_path / f"{c}.tar", [f"{i}.png" for i in range(5)])
    path = tar(
        tmp_path / "all.tar", {f"{c}.tar": (tmp_path / f"{c}.tar").read_bytes() for c in ("cat", "dog")}
    )
    found = open_split(Data(root=str(path)), "train")
    assert (found.classes, len(found)) == (["cat", "dog"], 8)
    assert np.array_equal(found.picture(7)[0], noise(int(found.name(7)[0])))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected a .tar, got nothing at"),
        (b"x" * 2000, "expected a .tar of class folders with images, got .* check the file"),
        (b"", "expected a .tar of class folders with images, got .* check the file"),
    ],
)
def test_an_archive_that_will_not_do(tmp_path, content, said):
    path = tmp_path / "photos.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=said):
        open_split(Data(root=str(path)), "train")


def test_an_archive_without_images_or_cut_off(tmp_path):
    with pytest.raises(ValueError, match=r"expected a .tar of class folders with images"):
        open_split(Data(root=str(tar(tmp_path / "notes.tar", {"cat/a.txt": b"x"}))), "train")
    path = archive(tmp_path / "cut.tar", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"expected a .tar of class folders with images, got unexpected end"):
        open_split(Data(root=str(path)), "train")


def cifar(root, count=7):
    """CIFAR-10 as torchvision keeps it, without its checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, count).tolist(),
        }
        (base / name).write_bytes(pickle.dumps(entry))
    words = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": words}))
    return words


def test_a_set_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    words = cifar(tmp_path)
    data = Data(root=str(tmp_path), reader="torch/cifar10")
    train, val = (open_split(data, split, words) for split in ("train", "validation"))
    assert (len(train), len(val), train.classes) == (35, 7, words)
    image, label = val.picture(6)
    whole = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert np.array_equal(np.array(image).transpose(2, 0, 1).ravel(), whole["data"][6])
    assert (label, val.name(6)) == (whole["labels"][6], "validation/6")


def test_a_set_of_torchvision_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected torch/cifar10 split 'train' at .*, got Dataset not found.*--data.d"
    ):
        open_split(Data(root=str(tmp_path), reader="torch/cifar10"), "train")
    with pytest.raises(ValueError, match="got Unknown torchvision dataset cifar11"):
        open_split(Data(root=str(tmp_path), reader="torch/cifar11"), "train")
    with pytest.raises(
        ValueError, match="expected torch/<name>, hfds/<name>, wds or none, got 'tfds/cifar10'"
    ):
        open_split(Data(root=str(tmp_path), reader="tfds/cifar10"), "train")


class Fake(list):
    """A set like torchvision's."""

    def __init__(self, labels, **words):
        super().__init__((noise(i), label) for i, label in enumerate(labels))
        self.__dict__.update(words)


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        ({"targets": [0, 1, 2, 1]}, ["0", "1", "2"]),
        ({"targets": np.array([0, 1, 2, 1])}, ["0", "1", "2"]),
        (
            {"classes": [("tench", "Tinca tinca"), ("goldfish",), ("ray",)]},
            ["tench, Tinca tinca", "goldfish", "ray"],
        ),
        ({"all_categories": ["a", "b", "c"]}, ["a", "b", "c"]),
    ],
)
def test_names_of_classes_in_a_library(monkeypatch, words, classes):
    monkeypatch.setattr(
        timm.data.dataset_factory, "create_dataset", lambda *_, **__: Fake([0, 1, 2, 1], **words)
    )
    assert open_split(Data(reader="torch/fake"), "train").classes == classes


@pytest.mark.parametrize("label", [-1, 3, 2**40])
@pytest.mark.parametrize("other", [None, ["d", "c", "b", "a"]])
def test_a_label_that_is_no_class(monkeypatch, label, other):
    made = Fake([0, label], classes=["a", "b", "c"])
    monkeypatch.setattr(timm.data.dataset_factory, "create_dataset", lambda *_, **__: made)
    found = open_split(Data(reader="torch/fake"), "train", other)
    assert found.picture(0)[1] == (3 if other else 0)
    with pytest.raises(ValueError, match=f"class {label} is none of 0 to 2"):
        found.picture(1)


def test_a_local_set_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder(tmp_path / "set", {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/dog": 2})
    (tmp_path / "set" / "train" / "cat" / "1.png").write_bytes(b"no image")
    datasets.disable_progress_bars()
    data = Data(root=str(tmp_path / "cache"), reader=f"hfds/{tmp_path / 'set'}", val_split="test")
    train = open_split(data, "train")
    val = open_split(data, "test", train.classes)
    assert (len(train), len(val), train.classes) == (6, 3, ["cat", "dog"])
    assert np.array_equal(val.picture(2)[0], noise(301))
    assert [train.picture(i)[1] for i in (0, 2, 3, 4, 5)] == [0, 0, 1, 1, 1]
    with pytest.raises(OSError, match="cannot identify"):
        train.picture(1)
    with pytest.raises(ValueError, match=r'split .validation. at .*, got Unknown split "validation"'):
        open_split(data, "validation")
    assert np.array_equal(pickle.loads(pickle.dumps(val)).picture(2)[0], noise(301))


def test_a_split_can_be_sent_to_another_process(tmp_path):
    folder(tmp_path, {"cat": 5, "dog": 5})
    found = open_split(Data(root=str(tmp_path)), "train", ["dog", "cat"]).shuffled(5)
    again = pickle.loads(pickle.dumps(found))
    assert [again.name(i) for i in range(5)] == [found.name(i) for i in range(5)]
    assert again.picture(3)[1] == found.picture(3)[1] == ("dog", "cat").index(found.name(3).split("/")[0])


def test_a_shuffled_share_is_always_the_same(tmp_path):
    folder(tmp_path, {"cat": 25, "dog": 25})
    found = open_split(Data(root=str(tmp_path)), "train")
    small, large = ([found.shuffled(n).name(i) for i in range(n)] for n in (10, 20))
    assert large[:10] == small
    assert len({*large}) == 20
    assert {name.split("/")[0] for name in small} == {"cat", "dog"}


def test_no_file_stays_open(tmp_path):
    folder(tmp_path / "files", {"cat": 5, "dog": 5})
    (tmp_path / "files" / "cat" / "0.png").write_bytes(png(noise(0))[:100])
    path = archive(tmp_path / "photos.tar", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])
    for root in (tmp_path / "files", path):
        found = open_split(Data(root=str(root)), "train")
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for i in range(len(found)):
            try:
                found.picture(i)
            except OSError:
                assert found.name(i) == "cat/0.png"
        assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_what_is_taken_for_shards(tmp_path):
    photos = folder(tmp_path / "photos", {"cat": 1, "dog": 1})
    (photos / "photos.tar").touch()  # what it was unpacked from
    assert not is_sharded(Data(root=str(photos)))
    streamed = tmp_path / "shards"
    streamed.mkdir()
    assert not is_sharded(Data(root=str(streamed)))
    (streamed / "train-0000.tar").touch()
    assert is_sharded(Data(root=str(streamed)))
    assert is_sharded(Data(root=str(photos), split="train-{0..3}.tar"))
    assert is_sharded(Data(root=str(photos), reader="wds"))
    assert not is_sharded(Data(root=str(streamed), reader="torch/cifar10"))
    (photos / "_info.json").write_text(json.dumps({}))
    assert is_sharded(Data(root=str(photos)))
    assert not is_sharded(Data(root=str(tmp_path / "none")))

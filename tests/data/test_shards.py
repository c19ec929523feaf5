"""WebDataset shards: what is in them, what is wrong with them, and who reads which."""

import gzip
import json
import pickle
import tarfile
from collections import Counter

import pytest
import torch
from pictures import AUGMENT, CPU, STATISTICS, noise, png, same, shards, tar, told

from sansmax.tasks._data.batches import TRIES
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.settings import Augment, Data
from sansmax.tasks._data.shards import Shards, read_shard, shard_list


def stream(root, workers=0, augment=AUGMENT, **words):
    data = Data(**{"root": str(root), "num_classes": 3, "num_samples": 24, "shuffle_buffer": 5} | words)
    return Shards(data, augment, (8, 8), 0.875, *STATISTICS, workers, CPU)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Four shards of 6 images to train with; 5 held out in three, one of them empty."""
    root = tmp_path_factory.mktemp("shards") / "a b é"
    shards(root, [6] * 4)
    shards(root, [3, 0, 2], "val")
    return root


def listed(root, split, **words):
    return shard_list(Data(**{"root": str(root), "num_classes": 3} | words), split)


def names(found):
    return [path.rpartition("/")[2] for path in found.paths]


TRAIN = [f"train-{i:04}.tar" for i in range(4)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", TRAIN),
        ("train-{0000..0003}.tar", TRAIN),
        ("train-{0001..0002}.tar", TRAIN[1:3]),
        ("train-*[02].tar", [TRAIN[0], TRAIN[2]]),
        ("train-0001.tar", [TRAIN[1]]),
        ("validation", [f"val-{i:04}.tar" for i in range(3)]),
        ("test", [f"val-{i:04}.tar" for i in range(3)]),
    ],
)
def test_shards_are_named_by_patterns(streamed, split, expected):
    found = listed(streamed, split)
    assert names(found) == expected
    assert (found.count, found.classes) == (None, ["0", "1", "2"])


def test_the_number_of_images_stands_behind_the_pattern_or_in_the_settings(streamed):
    assert listed(streamed, "train-*.tar|24").count == 24
    assert listed(streamed, "train-*.tar|24", num_samples=7).count == 24
    assert listed(streamed, "train", num_samples=7).count == 7
    assert listed(streamed, "validation", num_samples=7).count is None  # which counts images to train with
    with pytest.raises(ValueError, match=r"expected the number of images behind the \|, got 'many'"):
        listed(streamed, "train-*.tar|many")


def test_a_list_of_shards_as_timm_keeps_it(tmp_path):
    shards(tmp_path, [2, 2], "part")
    info = {
        "splits": {
            "train": {"num_samples": 2, "filenames": ["part-0000.tar"]},
            "val": {"num_samples": 2, "filenames": ["part-0001.tar"]},
        },
        "classes": ["ant", "bee", "cat"],
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    train, val = (listed(tmp_path, split, num_classes=None) for split in ("train", "validation"))
    assert (names(train), train.count, train.classes) == (["part-0000.tar"], 2, ["ant", "bee", "cat"])
    assert (names(val), val.count) == (["part-0001.tar"], 2)
    info["splits"]["train"]["filenames"] = ["pipe:touch evil"]
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"got .*/pipe:touch evil missing"):
        listed(tmp_path, "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"splits": ["a"]}', '{"splits": {"train": {}}}'])
def test_a_list_that_is_none(tmp_path, content):
    (tmp_path / "_info.json").write_text(content)
    with pytest.raises(ValueError, match=r"expected {.splits.*} in .*_info.json, got something else"):
        listed(tmp_path, "train")


@pytest.mark.parametrize(
    ("split", "words", "said"),
    [
        (
            "train-{0002..0005}.tar",
            {},
            r"expected shards in .*, got .*train-0004.tar missing; give a",
        ),
        ("fold", {}, r"expected shards in .* for 'fold', got none; give a pattern"),
        ("*.tgz.tar", {}, "got none; give a pattern"),
        (
            "train",
            {"num_classes": None},
            "data.num_classes: expected the number of classes, which no ",
        ),
    ],
)
def test_shards_that_are_not_there(streamed, split, words, said):
    with pytest.raises(ValueError, match=said):
        listed(streamed, split, **words)


def test_settings_that_shards_cannot_follow(streamed):
    with pytest.raises(ValueError, match=r"expected the number of training images, .*\|50000"):
        stream(streamed, num_samples=None)
    with pytest.raises(ValueError, match=r"augment.repeats: expected 1 with shards, .*, got 3"):
        stream(streamed, augment=Augment(repeats=3))


def read(path):
    """Keys of the samples, and what could not be read."""
    items = list(read_shard(str(path)))
    return (
        [item["__key__"] for item in items if isinstance(item, dict)],
        [item for item in items if isinstance(item, tuple)],
    )


@pytest.mark.parametrize("scheme", ["file://{}", "pipe:cat '{}'"])
def test_shards_behind_addresses(streamed, scheme):
    keys, failures = read(scheme.format(streamed / "train-0000.tar"))
    assert (keys, failures) == ([f"train{i:04}" for i in range(1, 7)], [])


def test_a_shard_that_was_cut(tmp_path):
    (path,) = shards(tmp_path, [20])
    whole = path.read_bytes()
    for cut in range(100, len(whole), 1500):
        path.write_bytes(whole[:cut])
        keys, failures = read(path)
        assert keys == [f"train{i:04}" for i in range(1, len(keys) + 1)]
        if len(keys) < 20:
            assert {name for name, _ in failures} == {"train-0000.tar"}
            assert "\n" not in failures[0][1]
            assert str(tmp_path) not in failures[0][1]
    path.write_bytes(whole)
    assert read(path) == ([f"train{i:04}" for i in range(1, 21)], [])


def test_a_compressed_shard(tmp_path):
    (path,) = shards(tmp_path, [20], suffix=".tar.gz")
    whole = path.read_bytes()
    assert gzip.decompress(whole)
    assert read(path) == ([f"train{i:04}" for i in range(1, 21)], [])
    path.write_bytes(whole[: len(whole) // 2])
    keys, failures = read(path)
    assert 5 < len(keys) < 15
    assert [name for name, _ in failures] == ["train-0000.tar.gz"]
    assert listed(tmp_path, "train-{0..0}000.tar.gz").paths == [str(path)]


def test_damage_between_two_images_is_no_end(tmp_path):
    (path,) = shards(tmp_path, [5])
    content = bytearray(path.read_bytes())
    header = content.index(b"train0003.cls")
    content[header : header + 512] = b"\xff" * 512
    path.write_bytes(content)
    keys, failures = read(path)
    assert keys[:2] == ["train0001", "train0002"]
    assert failures == [("train-0000.tar", "the archive is damaged or cut off (bad checksum)")]


@pytest.mark.parametrize("content", [b"", b"x" * 5000])
def test_a_shard_that_is_no_archive(tmp_path, content):
    path = tmp_path / "train-0000.tar"
    path.write_bytes(content)
    keys, failures = read(path)
    assert keys == []
    assert [name for name, _ in failures] == ["train-0000.tar"]
    path.unlink()
    assert read(path) == ([], [("train-0000.tar", "No such file or directory")])


def odd(root):
    """A shard of which a quarter is wrong, in every way."""
    root.mkdir(exist_ok=True)
    good = {f"g{i:02}.{kind}": c for i in range(12) for kind, c in (("png", png(noise(i))), ("cls", b"1\n"))}
    wrong = {
        "a.cls": b"1",
        "b.png": png(noise(1)),
        "c.png": png(noise(1)),
        "c.cls": b"3",
        "d.png": b"no image",
        "d.cls": b"1",
        "e.png": png(noise(1)),
        "e.cls": b"-1",
        "f.jpg": png(noise(1)),
        "f.cls": b"dog",
    }
    tar(root / "train-0000.tar", {**wrong, **good, "__meta__": b"x", "._g01.png": b"x", "README": b"x"})
    return root


REASONS = {
    "train-0000.tar/a": "no image (jpg, jpeg, png, webp) in the sample, which has cls",
    "train-0000.tar/b": "no class (cls) in the sample, which has png",
    "train-0000.tar/c": "class 3 is none of 0 to 2",
    "train-0000.tar/d": "cannot identify image file",
    "train-0000.tar/e": "class -1 is none of 0 to 2",
    "train-0000.tar/f": "invalid literal for int() with base 10: b'dog'",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_listed_once(tmp_path, workers):
    source = stream(odd(tmp_path), workers, val_split="train")
    assert sum(len(b.labels) for b in source.val(0, 1, 5)) == 12
    for epoch in range(2):
        assert [len(b.labels) for b in source.train(epoch, 0, Part(4))] == [4] * 6
    assert {entry["path"]: entry["reason"] for entry in source.skipped} == REASONS
    assert len(source.skipped) == 6


def test_two_files_of_one_name(tmp_path):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as file:
        for i in (1, 1, 2):
            for path in shards(tmp_path / f"{i}", [1], f"s{i}-"):
                with tarfile.open(path) as inner:
                    for member in inner:
                        file.addfile(member, inner.extractfile(member))
    keys, failures = read(tmp_path / "train-0000.tar")
    assert len(keys) == 2
    assert {reason for _, reason in failures} == {
        "s1-0001.cls: duplicate file name",
        "s1-0001.png: duplicate file name",
    }


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_from_any_update_on(streamed, workers, accumulate):
    source, part = stream(streamed, workers), Part(4, accumulate, seed=3)
    whole = told(source.train(2, 0, part))
    assert len(whole) == 6 * accumulate
    for update in range(1, 7):
        assert same(told(source.train(2, update, part)), whole[update * accumulate :])
    assert not same(told(source.train(1, 0, part)), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_any_update_on_with_unreadable_images(tmp_path, workers):
    source, part = stream(odd(tmp_path), workers, val_split="train"), Part(2, seed=3)
    whole = told(source.train(0, 0, part))
    for update in range(1, 13):
        assert same(told(source.train(0, update, part)), whole[update:])


def drawn(batches):
    """The images, told apart by what the network sees of them."""
    return [tuple((image * 1000).round().int().flatten().tolist()) for b in batches for image in b.images]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_shows_all_images_where_shards_suffice(streamed, workers, world):
    whole = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    source = stream(streamed, workers, whole)
    found = Counter()
    for rank in range(world):
        found.update(drawn(source.train(0, 0, Part(2 * world, 1, rank, world))))
    assert len(found) == sum(found.values()) == 24


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_held_out_image_comes_once(streamed, world):
    expected = None
    for workers in (0, 1, 2):
        source = stream(streamed, workers)
        found = [batch for rank in range(world) for batch in source.val(rank, world, 2)]
        positions = torch.cat([b.positions for b in found])
        images, labels = torch.cat([b.images for b in found]), torch.cat([b.labels for b in found])
        images, labels = images[positions.argsort()], labels[positions.argsort()]
        assert positions.sort().values.tolist() == [0, 1, 2, 2 * 10**9, 2 * 10**9 + 1]
        assert labels.tolist() == [1, 2, 0, 1, 2]
        expected = images if expected is None else expected
        assert torch.equal(images, expected)
    assert stream(streamed).picture(0) is None


def test_fewer_shards_than_workers(tmp_path):
    shards(tmp_path, [6])
    shards(tmp_path, [1], "val")
    source = stream(tmp_path, 2, Augment())
    found = drawn(source.train(0, 0, Part(4)))
    assert len(found) == 24
    assert len({*found}) > 16


def test_a_worker_whose_shard_is_empty_reads_the_others(tmp_path):
    shards(tmp_path, [0, 6])
    shards(tmp_path, [1], "val")
    source = stream(tmp_path, 2)
    assert [len(b.labels) for b in source.train(0, 0, Part(4))] == [4] * 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["empty", "damaged", "unreadable"])
def test_where_nothing_can_be_read_one_sentence_says_so(tmp_path, workers, kind):
    for split in ("train", "val"):
        for path in shards(tmp_path, [0, 0], split):
            if kind == "damaged":
                path.write_bytes(b"x" * 999)
            elif kind == "unreadable":
                tar(path, {f"{i}.{c}": b"x" for i in range(2 * TRIES) for c in ("png", "cls")})
    source = stream(tmp_path, workers)
    with pytest.raises(ValueError, match=r"^data: expected images that .*, got .*check the files$"):
        next(source.train(0, 0, Part(4)))
    with pytest.raises(ValueError, match=r"can be read in shards validation, got none"):
        list(source.val(0, 1, 4))
    assert (len(source.skipped) >= TRIES) if kind == "unreadable" else len(source.skipped) < 5


def test_a_stream_can_be_sent_to_another_process(streamed):
    source = stream(streamed)
    again = pickle.loads(pickle.dumps(source._train))
    again.part = Part(2)
    assert torch.equal(next(iter(again))[0], next(iter(pickle.loads(pickle.dumps(again))))[0])

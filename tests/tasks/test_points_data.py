"""Layouts of point clouds, and what cannot be used in them."""

import json
import sys

import h5py
import numpy as np
import pytest
import torch

from sansmax.cli import main
from sansmax.tasks import points
from sansmax.tasks._data import points_sets
from sansmax.tasks._data.points import in_ball, open_clouds
from sansmax.tasks._data.points_files import read_cloud, write_ply
from sansmax.tasks._recipes.points import PointData, Recipe


def balls(count=6, size=30, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size, 3)).astype(np.float32)


def npz(path, xyz, label, **arrays):
    np.savez(path, xyz=xyz, label=np.array(label), **arrays)
    return PointData(root=str(path))


CUBE = "OFF{}8 6 0\n0 0 0\n2 0 0\n2 2 0\n0 2 0\n0 0 2\n2 0 2\n2 2 2\n0 2 2\n" + "\n".join(
    f"4 {face}" for face in ("0 1 2 3", "4 5 6 7", "0 1 5 4", "1 2 6 5", "2 3 7 6", "3 0 4 7")
)


def test_modelnet_folders_of_off_files(tmp_path):
    for name in ("bed", "chair"):
        for split, count in (("train", 3), ("test", 2)):
            (tmp_path / name / split).mkdir(parents=True)
            for i in range(count):
                text = CUBE.format("\n" if i else "")  # as in ModelNet40, where the counts may follow at once
                (tmp_path / name / split / f"{name}_{i:04d}.off").write_text(text)
    data = PointData(root=str(tmp_path))
    found = open_clouds(data, 24, False)
    assert found.classes == ["bed", "chair"]
    assert (len(found.train), len(found.val), found.skipped) == (6, 4, [])
    assert found.train.names[0] == "bed/train/bed_0000.off"
    cube = read_cloud(tmp_path / "bed" / "train" / "bed_0000.off", 4000)[0]
    assert np.array_equal(cube, read_cloud(tmp_path / "bed" / "train" / "bed_0000.off", 4000)[0])
    faces = [np.isclose(cube[:, axis], side).mean() for axis in range(3) for side in (0, 2)]
    assert faces == pytest.approx([1 / 6] * 6, abs=0.03)  # equal areas, equally many points
    assert torch.equal(found.val.xyz, open_clouds(data, 24, False).val.xyz)


def test_class_folders_of_many_formats_hold_the_same_cloud(tmp_path):
    xyz = balls(1, 20)[0]
    for folder in ("train/a", "train/b", "val/a", "val/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "1.npy", np.hstack([xyz, xyz]))
        np.savez(tmp_path / folder / "2.npz", xyz=xyz)
        rows = [" ".join(map(repr, map(float, row))) for row in xyz]
        (tmp_path / folder / "3.xyz").write_text("# a comment\n" + "\n".join(rows) + "\n")
        (tmp_path / folder / "4.txt").write_text("\n".join(row.replace(" ", ",") + ",0,0,1" for row in rows))
        write_ply(tmp_path / folder / "5.ply", xyz, np.arange(20), np.zeros((20, 3), np.uint8))
        header = "ply\nformat ascii 1.0\nelement vertex 20\n" + "".join(
            f"property float {axis}\n" for axis in "xyz"
        )
        (tmp_path / folder / "6.ply").write_text(header + "end_header\n" + "\n".join(rows) + "\n")
        (tmp_path / folder / ".hidden.npy").write_bytes(b"")
    found = open_clouds(PointData(root=str(tmp_path)), 24, False)
    assert (len(found.train), len(found.val), found.skipped) == (12, 12, [])
    for i in range(12):
        got = found.train.xyz[found.train.starts[i] : found.train.starts[i + 1]]
        torch.testing.assert_close(got, torch.from_numpy(in_ball(xyz)), rtol=1e-5, atol=1e-6)
    more = open_clouds(PointData(root=str(tmp_path), split="trainval"), 24, False)
    assert len(more.train) == 24
    with pytest.raises(ValueError, match=r"data.val_split: .*trainval"):
        open_clouds(PointData(root=str(tmp_path), split="trainval", val_split="val"), 24, False)
    whole = open_clouds(PointData(root=str(tmp_path / "train")), 24, False)
    assert (len(whole.train), len(whole.val)) == (10, 2)
    assert "a fifth" in whole.split


def test_lists_of_modelnet40_normal_resampled(tmp_path):
    lists = {"train": "bed_0001\nbed_0002\ntv_stand_0001\n", "test": "bed_0003\ntv_stand_0002\n"}
    for name, text in lists.items():
        (tmp_path / f"modelnet40_{name}.txt").write_text(text)
        for stem in text.split():
            (tmp_path / stem[:-5]).mkdir(exist_ok=True)
            np.savetxt(tmp_path / stem[:-5] / f"{stem}.txt", np.hstack([balls()[0]] * 2), delimiter=",")
    found = open_clouds(PointData(root=str(tmp_path)), 24, False)
    assert (len(found.train), len(found.val), found.classes) == (3, 2, ["bed", "tv_stand"])


def test_modelnet40_as_hdf5(tmp_path):
    for name, seed in (("train0", 0), ("train1", 1), ("test0", 2)):
        with h5py.File(tmp_path / f"ply_data_{name}.h5", "w") as file:
            file["data"] = balls(4, 40, seed)
            file["label"] = np.array([[0], [1], [1], [0]], np.uint8)
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    found = open_clouds(PointData(root=str(tmp_path)), 24, False)
    assert found.classes == ["airplane", "bathtub"]
    assert found.train.labels.tolist() == [0, 1, 1, 0] * 2
    torch.testing.assert_close(found.val.xyz[:40], torch.from_numpy(in_ball(balls(4, 40, 2)[0])))
    (tmp_path / "shape_names.txt").unlink()
    assert open_clouds(PointData(root=str(tmp_path)), 24, False).classes == ["0", "1"]
    with pytest.raises(ValueError, match="kind: expected clouds with labelled parts"):
        open_clouds(PointData(root=str(tmp_path)), 24, True)
    (tmp_path / "ply_data_test0.h5").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected data and label in"):
        open_clouds(PointData(root=str(tmp_path)), 24, False)


@pytest.fixture
def shapenet(tmp_path):
    """ShapeNet part's text: two airplanes and two mugs to learn, one of each to validate and to test."""
    (tmp_path / "synsetoffset2category.txt").write_text("Airplane\t02691156\nMug\t03797390\n")
    (tmp_path / "train_test_split").mkdir()
    number = 0
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        listed = []
        for synset, first, parts in (("02691156", 0, 4), ("03797390", 36, 2)):
            (tmp_path / synset).mkdir(exist_ok=True)
            for _ in range(count):
                rows = np.hstack([balls(1, 30, number)[0]] * 2 + [first + np.arange(30)[:, None] % parts])
                np.savetxt(tmp_path / synset / f"{number}.txt", rows, fmt="%.6f")
                listed.append(f"shape_data/{synset}/{number}")
                number += 1
        path = tmp_path / "train_test_split" / f"shuffled_{split}_file_list.json"
        path.write_text(json.dumps(listed))
    return tmp_path


def test_shapenet_part_as_text(shapenet):
    found = open_clouds(PointData(root=str(shapenet)), 24, True)
    assert len(found.parts) == 50
    assert len(found.classes) == 16
    assert found.train.labels.tolist() == [0, 0, 11, 11]
    assert found.train.parts[:5].tolist() == [0, 1, 2, 3, 0]
    assert found.val.parts[-30:].unique().tolist() == [36, 37]
    assert len(open_clouds(PointData(root=str(shapenet), split="trainval"), 24, True).train) == 6
    assert points.own_parts(found.parts).sum(1).tolist() == [4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3]
    (shapenet / "02691156" / "0.txt").unlink()
    rows = np.loadtxt(shapenet / "02691156" / "1.txt")
    rows[3, -1] = 36
    np.savetxt(shapenet / "02691156" / "1.txt", rows, fmt="%.6f")
    found = open_clouds(PointData(root=str(shapenet)), 24, True)
    assert found.skipped == [
        {"path": "02691156/0.txt", "reason": "No such file or directory"},
        {"path": "02691156/1.txt", "reason": "part 36 is none of its class, which has 0, 1, 2, 3"},
    ]
    (shapenet / "synsetoffset2category.txt").write_text("Airplan\t02691156\n")
    with pytest.raises(ValueError, match=r"ShapeNet part's categories in .*, got Airplan; write"):
        open_clouds(PointData(root=str(shapenet)), 24, True)


def test_shapenet_part_as_hdf5(tmp_path):
    folder = tmp_path / "hdf5_data"
    folder.mkdir()
    for name, seed in (("ply_data_train0", 0), ("ply_data_val0", 1), ("ply_data_test0", 2)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["data"] = balls(3, 40, seed)
            file["label"] = np.array([[4], [15], [4]], np.uint8)
            file["pid"] = np.array([[12, 15] * 20, [47] * 40, [13] * 40], np.uint8)
    found = open_clouds(PointData(root=str(tmp_path)), 24, True)
    assert [found.classes[i] for i in found.train.labels] == ["Chair", "Table", "Chair"]
    assert found.skipped == []


def test_an_npz_with_integers_and_parts(tmp_path):
    names = {
        "parts": np.array([b"bird/wing", b"cup/ear", b"cup/body"]),
        "classes": np.array([b"cup", b"bird"]),
    }
    part = np.array([[1, 2] * 15, [0] * 30, [2] * 30, [0] * 30])
    xyz = (2047 * balls(4) / 5).astype(np.int16)
    data = npz(tmp_path / "a.npz", xyz, [0, 1, 0, 1], part=part, split=[0, 0, 1, 1], **names)
    found = open_clouds(data, 24, True)
    assert found.classes == ["bird", "cup"]  # in the order of the parts, as the network numbers them
    assert found.train.labels.tolist() == [1, 0]
    assert found.train.parts[:3].tolist() == [1, 2, 1]
    assert open_clouds(data, 24, False).classes == ["cup", "bird"]
    whole = npz(tmp_path / "b.npz", balls(20), [0, 1] * 10)
    found = open_clouds(whole, 24, False)
    assert (len(found.train), len(found.val)) == (16, 4)
    for arrays, message in (
        ({"label": [0, 1, 0]}, "as many entries of label as clouds, 4, got 3"),
        ({"label": [0, 1, 0, 1], "split": [0, 1]}, "as many entries of split"),
    ):
        np.savez(tmp_path / "c.npz", xyz=balls(4), **arrays)
        with pytest.raises(ValueError, match=message):
            open_clouds(PointData(root=str(tmp_path / "c.npz")), 24, False)
    np.savez(tmp_path / "c.npz", points=balls(4))
    with pytest.raises(ValueError, match=r"expected an .npz with xyz \(n, points, 3\) and label"):
        open_clouds(PointData(root=str(tmp_path / "c.npz")), 24, False)


def test_bad_clouds_are_skipped_and_listed(tmp_path):
    xyz = balls(12)
    xyz[1, 3] = np.nan
    xyz[2, 5, 1] = np.inf
    xyz[3] = xyz[3, 0]
    label = [0, 0, 1, 1, 7, 0, 1, 0, 1, 0, 1, 0]
    data = npz(tmp_path / "a.npz", xyz, label, split=[0] * 8 + [1] * 4, classes=np.array(["a", "b"]))
    found = open_clouds(data, 24, False)
    assert found.skipped == [
        {"path": "a.npz[1]", "reason": "1 of 30 points with coordinates that are not finite"},
        {"path": "a.npz[2]", "reason": "1 of 30 points with coordinates that are not finite"},
        {"path": "a.npz[3]", "reason": "all 30 points in one place"},
        {"path": "a.npz[4]", "reason": "class 7 is none of 0 to 1"},
    ]
    assert (len(found.train), len(found.val)) == (4, 4)
    folder = tmp_path / "folder"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(5):
            np.save(folder / name / f"{i}.npy", balls(1, 20, i)[0])
    np.save(folder / "a" / "one.npy", balls(1, 1)[0])
    (folder / "a" / "empty.txt").write_text("")
    (folder / "a" / "ragged.xyz").write_text("0 0 0\n1 1\n")
    (folder / "a" / "words.txt").write_text("x y z\n0 0 0\n")
    (folder / "b" / "cut.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    (folder / "b" / "flat.npy").write_bytes(b"\x93NUMPY")
    (folder / "b" / "pickled.npy").write_bytes(b"")
    found = open_clouds(PointData(root=str(folder)), 24, False)
    reasons = {bad["path"]: bad["reason"] for bad in found.skipped}
    assert len(reasons) == 7
    assert reasons["a/one.npy"] == "1 points"
    assert reasons["a/empty.txt"] == "no numbers"
    assert reasons["a/ragged.xyz"] == "lines of 2 and 3 columns"
    assert all(reasons.values())


def refusals(root):
    bad = balls(4)
    bad[:, 0] = np.nan
    return (
        (npz(root / "nan.npz", bad, [0, 1] * 2, split=[0, 0, 1, 1]), "got 2 that cannot, nan.npz.0.: 1 "),
        (npz(root / "one.npz", balls(), [0] * 6), "at least two classes, got 0 in"),
        (npz(root / "all.npz", balls(), [0, 1] * 3, split=[0] * 6), "which has train, got 'test'"),
        (PointData(root=str(root / "none")), "got nothing at .*; check the path"),
        (PointData(root=str(root)), r"expected <class>/\*\{.off,.ply,"),
    )


@pytest.mark.parametrize("number", range(5))
def test_senseless_data_are_refused_in_a_sentence(tmp_path, capsys, number):
    data, message = refusals(tmp_path)[number]
    with pytest.raises((ValueError, OSError), match=message):
        points.open_task(Recipe(data=data, points=24), torch.device("cpu"))
    out = str(tmp_path / "run")
    assert main(["train", "points_external", "--data.root", data.root, "--out", out]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_missing_package_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "ply_data_train0.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected h5py, .*; pip install sansmax\[points\]"):
        points_sets.find(str(tmp_path), 10)
    monkeypatch.setitem(sys.modules, "trimesh", None)
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.off").write_text(CUBE.format("\n"))
    with pytest.raises(ValueError, match=r"expected trimesh, .*; pip install sansmax\[points\]"):
        points_sets.find(str(tmp_path / "set"), 10)

"""`sansmax predict`: every image once, whatever it is called, whatever happens, however many processes."""

import csv
import io
import json
import os
import signal
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sansmax
from sansmax import cli
from sansmax.train import predict as module
from sansmax.train.network import load_network
from sansmax.train.predict import predict

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
WORDS = {"embed_dim": 12, "depth": 1, "num_heads": 2, "patch_size": 8}


def write_run(folder, file="best.safetensors", mechanism="", **own):
    """The folder of a run of a network so small that it costs nothing."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    model = sansmax.create_model(
        "vit_mini", mechanism or None, img_size=16, num_classes=len(CLASSES), **WORDS
    )
    metadata = {
        "model": "vit_mini",
        "mechanism": mechanism,
        "model_args": json.dumps(WORDS),
        "num_classes": str(len(CLASSES)),
        "classes": json.dumps(CLASSES),
        "img_size": "16",
        "in_chans": "3",
        "mean": "[0.4, 0.5, 0.6]",
        "std": "[0.2, 0.25, 0.3]",
        "eval_crop": "0.875",
        "interpolation": "bicubic",
        "epoch": "3",
        "top1": "0.5",
    }
    save_file(model.state_dict(), folder / file, metadata | own)
    return model.eval()


def picture(seed, size=(19, 17)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            content = png(i) if name.endswith(".png") else b"3"
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return str(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    """13 images in three folders."""
    for i in range(13):
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    return tmp_path / "images"


def command(*words, code=0, **flags):
    flags = [
        w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", *([] if v is True else [str(v)]))
    ]
    assert cli.main(["predict", *map(str, words), *flags]) == code


def expected(network, path):
    with torch.no_grad():
        return network.model(network.transform()(Image.open(path).convert("RGB"))[None])[0].softmax(0)


def test_rows_are_what_the_network_sees(run, images, tmp_path, capsys):
    out = tmp_path / "new folder" / "out.csv"
    command(run, images, out=out, top_k=3, batch_size=4, part_size=5)
    assert capsys.readouterr().out == f"{out}: 13 rows, 0 of them with an error\n"
    rows = rows_of(out)
    assert [row["path"] for row in rows] == sorted(str(p.relative_to(images)) for p in images.rglob("*.png"))
    assert list(rows[0]) == [
        "path",
        *(f"top{i}{end}" for i in (1, 2, 3) for end in ("", "_probability")),
        "error",
    ]
    network = load_network(run)
    for row in rows:
        share, index = expected(network, images / row["path"]).topk(3)
        assert [row[f"top{i}"] for i in (1, 2, 3)] == [CLASSES[i] for i in index]
        got = [float(row[f"top{i}_probability"]) for i in (1, 2, 3)]
        assert got == pytest.approx(share.tolist(), rel=1e-4)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.csv", "out.csv.json"]
    assert json.loads((out.parent / "out.csv.json").read_text())["images"] == 13


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_embeddings_are_those_of_the_network(name, run, images, tmp_path):
    out = tmp_path / name
    command(run, images, out=out, embeddings=True, top_k=99, part_size=6)
    if name.endswith("csv"):
        got = {row["path"]: [*map(float, row["embedding"].split())] for row in rows_of(out)}
        columns = list(rows_of(out)[0])
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(out)
        got = dict(zip(*(table.column(c).to_pylist() for c in ("path", "embedding")), strict=True))
        columns = table.column_names
        assert str(table.schema.field("embedding").type) == "list<element: float>"
        assert table.column("error").null_count == 13
    assert len(columns) == 1 + 2 * len(CLASSES) + 2  # 99 are not there
    network = load_network(run)
    for path in images.rglob("*.png"):
        x = network.transform()(Image.open(path).convert("RGB"))[None]
        with torch.no_grad():
            want = network.model.forward_head(network.model.forward_features(x), pre_logits=True)[0]
        torch.testing.assert_close(
            torch.tensor(got[str(path.relative_to(images))]), want, rtol=1e-4, atol=1e-5
        )


def test_any_name_and_unreadable_images(run, tmp_path):
    folder = tmp_path / "a folder, with a comma"
    names = [
        "plain.png",
        "two words.PNG",
        'a,b;"c".png',
        "line\nbreak.png",
        "grün木.png",
        os.fsdecode(b"\xff.png"),
    ]
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(names):
        picture(i).save(folder / "sub" / name, "PNG")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes(png(0)[:200])
    (folder / "notes.txt").write_text("left out")
    (folder / ".hidden.png").write_bytes(png(0))
    for kind in ("csv", "parquet"):
        out = tmp_path / f"out {kind}.{kind}"
        command(run, folder, out=out, part_size=4)
        if kind == "csv":
            rows = rows_of(out)
        else:
            rows = pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
        assert sorted(row["path"] for row in rows if not row["error"]) == sorted(
            f"sub/{name.encode(errors='surrogateescape').decode(errors='backslashreplace')}" for name in names
        )
        failed = {row["path"]: row for row in rows if row["error"]}
        assert set(failed) == {"broken.jpg", "empty.jpg", "cut.png"}
        assert "cannot identify" in failed["broken.jpg"]["error"]
        assert "truncated" in failed["cut.png"]["error"]
        assert not failed["cut.png"]["top1"]
        assert not failed["cut.png"]["top5_probability"]


def test_one_image_and_one_tar(run, images, tmp_path):
    command(run, images / "a" / "0.png", out=tmp_path / "one.csv")
    assert [row["path"] for row in rows_of(tmp_path / "one.csv")] == ["0.png"]
    write_tar(tmp_path / "set.tar", ["x/1.png", "x/1.cls", "x/2.png", "x/2.cls"])
    command(run, tmp_path / "set.tar", out=tmp_path / "tar.csv")
    assert [row["path"] for row in rows_of(tmp_path / "tar.csv")] == ["set.tar/x/1.png", "set.tar/x/2.png"]


def test_shards_by_pattern_and_by_folder(run, tmp_path):
    (tmp_path / "shards").mkdir()
    for i in range(3):
        write_tar(tmp_path / "shards" / f"s-{i:02d}.tar", [f"{i}{k}.png" for k in range(4)])
    pattern = f"{tmp_path}/shards/s-{{00..02}}.tar"
    command(run, pattern, out=tmp_path / "pattern.csv")
    command(run, tmp_path / "shards", out=tmp_path / "folder.csv")
    want = [f"s-{i:02d}.tar/{i}{k}.png" for i in range(3) for k in range(4)]
    assert [row["path"] for row in rows_of(tmp_path / "folder.csv")] == want
    assert [row["path"] for row in rows_of(tmp_path / "pattern.csv")] == [
        f"{tmp_path}/shards/{w}" for w in want
    ]


@pytest.mark.parametrize("cut", ["inside an image", "inside a header", "between two images", "zeros"])
def test_a_truncated_tar_gives_what_is_there_and_says_so(cut, run, tmp_path):
    path = tmp_path / "set.tar"
    write_tar(path, [f"{k}.png" for k in range(5)])
    with tarfile.open(path) as tar:
        third = tar.getmember("3.png")
    content = path.read_bytes()
    end = {"inside an image": third.offset_data + 100, "inside a header": third.offset + 100}.get(
        cut, third.offset
    )
    path.write_bytes(content[:end] if cut != "zeros" else content[:end] + b"x" * 512)
    command(run, path, out=tmp_path / "out.csv")
    rows = rows_of(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == ["set.tar/0.png", "set.tar/1.png", "set.tar/2.png", "set.tar"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]


def test_what_is_no_tar_is_a_row_with_the_reason(run, tmp_path):
    (tmp_path / "set.tar").write_bytes(b"nothing of the kind")
    command(run, tmp_path / "set.tar", out=tmp_path / "out.csv")
    (row,) = rows_of(tmp_path / "out.csv")
    assert row["path"] == "set.tar"
    assert row["error"]


def forked(network, images, out, rank, world):
    """A process that predicts; a fork, because the imports of a fresh one take seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads
        process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)  # the threads of the other process are not in this one
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        predict(network, str(images), out, top_k=2, batch_size=2, part_size=3, device="cpu")
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_twice_and_finished_by_two_processes(run, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(120):
        picture(i, (150, 150)).save(folder / f"{i:03d}.png")
    network, out = load_network(run), tmp_path / "out.csv"
    done = [0]
    for _ in range(2):
        process = forked(network, folder, out, 0, 1)
        deadline = time.monotonic() + 60
        while (count := len([*tmp_path.glob("out.csv.parts/0*.csv")])) <= done[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        done.append(count)
    assert 0 < done[1] < done[2] < 40
    assert not out.exists()
    processes = [forked(network, folder, out, rank, 2) for rank in (0, 1)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [f"{i:03d}.png" for i in range(120)]
    assert not any(row["error"] for row in rows)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "many", "out.csv", "out.csv.json"}


def stopping(monkeypatch, owner, name, after):
    """`owner.name` works `after` times and is then interrupted."""
    works, calls = getattr(owner, name), []

    def stopped(*arguments, **words):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return works(*arguments, **words)

    monkeypatch.setattr(owner, name, stopped)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (module._Work, "join", 0),
        (module, "write_json", 0),  # the settings of the parts' folder
        (module, "write_json", 1),  # OUT.json
        (module.shutil, "rmtree", 1),
        (module, "_forward", 2),
    ],
)
def test_stopped_anywhere_it_goes_on(owner, name, after, run, images, tmp_path, monkeypatch):
    network, out = load_network(run), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        stopping(patch, owner, name, after)
        with pytest.raises(KeyboardInterrupt):
            predict(network, str(images), out, part_size=3)
    forwards = stopping(monkeypatch, module, "_forward", 99)
    assert predict(network, str(images), out, part_size=3) == module.Outcome(13, 0, 0)
    assert len(forwards) == {"join": 0, "_forward": 3, "rmtree": 0}.get(name, 5 if after == 0 else 0)
    assert len({row["path"] for row in rows_of(out)}) == len(rows_of(out)) == 13
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"run", "images", "out.csv", "out.csv.json"}


def test_again_there_is_nothing_to_do_and_other_settings_are_refused(run, images, tmp_path, monkeypatch):
    network, out = load_network(run), tmp_path / "out.csv"
    first = predict(network, str(images), out, part_size=3)
    before = out.stat().st_mtime_ns
    forwards = stopping(monkeypatch, module, "_forward", 99)
    assert predict(network, str(images), out, part_size=3, batch_size=3) == first
    assert not forwards
    assert out.stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"out: expected part_size 3, with which .* was begun, got 4; use the same"
    ):
        predict(network, str(images), out, part_size=4)
    out.unlink()
    picture(99).save(images / "new.png")
    assert predict(network, str(images), out, part_size=4).images == 14


def test_other_weights_do_not_go_on_with_parts(run, images, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        stopping(patch, module, "_forward", 2)
        with pytest.raises(KeyboardInterrupt):
            predict(load_network(run), str(images), out, part_size=3)
    model = write_run(tmp_path / "run")
    with torch.no_grad():
        model.head.bias += 1
    best = tmp_path / "run" / "best.safetensors"
    with safe_open(best, "pt") as file:
        metadata = file.metadata()
    save_file(model.state_dict(), best, metadata)
    with pytest.raises(ValueError, match="out: expected weights"):
        predict(load_network(run), str(images), out, part_size=3)


def test_an_input_that_has_gone_is_refused_and_ctrl_c_says_how_to_go_on(
    run, images, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        stopping(patch, module, "_forward", 2)
        command(run, images, out=out, part_size=3, code=130)
    assert "the same command goes on" in capsys.readouterr().err
    images.rename(tmp_path / "elsewhere")
    command(run, images, out=out, part_size=3, code=2)
    assert f"got nothing at {images}" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(images)
    command(run, images, out=out, part_size=3)
    assert len(rows_of(out)) == 13
    assert not any(row["error"] for row in rows_of(out))


def test_features_without_classes(run, images, tmp_path):
    command(run, images, out=tmp_path / "out.csv", top_k=0, embeddings=True)
    assert list(rows_of(tmp_path / "out.csv")[0]) == ["path", "error", "embedding"]
    network = load_network(run)
    network.model.reset_classifier(0)
    with pytest.raises(ValueError, match="expected classes, got vit_mini, which has none; add --embeddings"):
        predict(network, str(images), tmp_path / "none.csv")
    predict(network, str(images), tmp_path / "features.csv", embeddings=True)
    one, other = (rows_of(tmp_path / name)[3]["embedding"] for name in ("out.csv", "features.csv"))
    assert one == other


def test_processes_share_the_parts(run, images, tmp_path, monkeypatch):
    network, out = load_network(run), tmp_path / "out.csv"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, missing in ((2, 4), (0, 2), (1, 0)):  # 5 parts: 0 3, 1 4, 2
        monkeypatch.setenv("RANK", str(rank))
        outcome = predict(network, str(images), out, part_size=3)
        assert outcome == module.Outcome(0 if missing else 13, 0, missing)
        assert out.exists() == (not missing)
    monkeypatch.setenv("RANK", "2")
    assert predict(network, str(images), out, part_size=3).images == 13
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE: expected a process"):
        predict(network, str(images), out)


@pytest.mark.parametrize(
    ("words", "flags", "sentence"),
    [
        (["runn", "images"], {}, "unknown name 'runn' in networks"),
        (["vit_mni", "images"], {}, "did you mean 'vit_mini'?"),
        (["no/such/run", "images"], {}, "got nothing; check the path"),
        (["images", "images"], {}, "best.safetensors or weights.safetensors in images, got neither"),
        (["vit_mini", "images"], {}, "got vit_mini, for which none are hosted"),
        (["run", "nowhere"], {}, "got nothing at nowhere"),
        (["run", "empty"], {}, "below empty, got none"),
        (["run", "notes.txt"], {}, "notes.txt, which is no image"),
        (["run", "s-{00..02}.tar"], {}, "expected 3 shards, got 3 that are not there, s-00.tar first"),
        (["run", "images"], {"out": "out.json"}, "ends in .csv or .parquet, got out.json"),
        (["run", "images"], {"out": "notes.txt/out.csv"}, "got 'Not a directory'; make room"),
        (["run", "images"], {"out": "mine.csv"}, "got mine.csv from elsewhere"),
        (["run", "images"], {"top_k": 0}, "top_k: expected a whole number of at least 1, got 0"),
        (["run", "images"], {"batch_size": 0}, "batch_size: expected"),
        (["run", "images"], {"img_size": 13}, "img_size: expected a size that vit_mini takes, got 13"),
        (["run", "images"], {"device": "gpu"}, "device: expected auto, cpu or"),
    ],
)
def test_a_sentence_for_what_cannot_be(words, flags, sentence, run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing to see")
    (tmp_path / "mine.csv").write_text("do not lose me")
    command(*words, code=2, **{"out": "out.csv", **flags})
    out, err = capsys.readouterr()
    assert sentence in err
    assert err.startswith("sansmax: ")
    assert err.count("\n") == 1
    assert out == ""
    assert (tmp_path / "mine.csv").read_text() == "do not lose me"
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


def test_parquet_without_pyarrow_names_the_extra(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install sansmax\[data\]"):
        predict(load_network(run), str(images), tmp_path / "out.parquet")


def in_one_piece(network, path):
    """The network at the image's own size, filled up with zeros to whole patches of 8."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(t)[:, None, None] for t in (network.mean, network.std))
    height, width = pixels.shape[1:]
    pixels = torch.nn.functional.pad((pixels - mean) / std, (0, -width % 8, 0, -height % 8))
    network.model.set_input_size(tuple(pixels.shape[1:]))
    with torch.no_grad():
        return network.model.forward_features(pixels[None])


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_tiles_of_images_at_their_own_size(name, images, tmp_path):
    write_run(tmp_path / "run", mechanism="sima")
    picture(20, (51, 67)).save(images / "large.png")
    (images / "cut.png").write_bytes((images / "large.png").read_bytes()[:3000])
    write_tar(images / "set.tar", ["1.png"])
    out = tmp_path / name
    command(tmp_path / "run", images, out=out, tile=16, top_k=2, embeddings=True, scratch=tmp_path / "run")
    if name.endswith("csv"):
        rows = {row["path"]: row for row in rows_of(out)}
        embeddings = {key: [*map(float, row["embedding"].split())] for key, row in rows.items()}
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
        rows = {row["path"]: row for row in table}
        embeddings = {key: row["embedding"] for key, row in rows.items()}
    assert len(rows) == 16
    assert rows["cut.png"]["error"]
    assert not rows["cut.png"]["top1"]
    assert [key for key, row in rows.items() if row["error"]] == ["cut.png"]
    network = load_network(str(tmp_path / "run"))
    write_tar(tmp_path / "set.tar", ["1.png"])
    with tarfile.open(tmp_path / "set.tar") as tar:
        tar.extract("1.png", tmp_path, filter="data")
    paths = {"set.tar/1.png": tmp_path / "1.png"}
    for key in ("large.png", "a/0.png", "set.tar/1.png"):
        features = in_one_piece(network, paths.get(key, images / key))
        share, index = network.model.forward_head(features)[0].softmax(0).topk(2)
        assert [rows[key][f"top{i}"] for i in (1, 2)] == [CLASSES[i] for i in index]
        got = [float(rows[key][f"top{i}_probability"]) for i in (1, 2)]
        assert got == pytest.approx(share.tolist(), rel=1e-4)
        want = network.model.forward_head(features, pre_logits=True)[0].tolist()
        assert embeddings[key] == pytest.approx(want, rel=1e-3, abs=1e-5)


def test_tiles_of_one_image_print_its_classes(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", mechanism="aft_simple")
    picture(1, (30, 40)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for kind in ("csv", "parquet"):
        out = tmp_path / f"out.{kind}"
        command(tmp_path / "run", tmp_path / "image.png", "--tile", out=out, top_k=3)
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == f"{out}: 1 rows, 0 of them with an error"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        network = load_network(str(tmp_path / "run"))
        features = in_one_piece(network, tmp_path / "image.png")
        share, index = network.model.forward_head(features)[0].softmax(0).topk(3)
        shown = [(line.split()[1], float(line.split()[0].rstrip("%")) / 100) for line in lines]
        assert [name for name, _ in shown] == [CLASSES[i] for i in index]
        assert [p for _, p in shown] == pytest.approx(share.tolist(), abs=1e-4)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert json.loads((tmp_path / "out.csv.json").read_text())["tile"] == 1024
    command(tmp_path / "run", tmp_path / "image.png", out=tmp_path / "whole.csv")
    assert "Use --tile." in rows_of(tmp_path / "whole.csv")[0]["error"]
    (tmp_path / "image.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    command(tmp_path / "run", tmp_path / "image.png", "--tile", 8, out=tmp_path / "cut.csv")
    first, reason = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("1 rows, 1 of them with an error")
    assert reason == rows_of(tmp_path / "cut.csv")[0]["error"]


@pytest.mark.parametrize(
    ("mechanism", "words", "sentence"),
    [
        ("soft", ["--tile", "16"], "predict_tiled: expected layers that need of all tokens only sums"),
        ("sima", ["--tile", "12"], "tile: expected a multiple of the patch of 8 pixels, got 12; use 16"),
        ("sima", ["--tile", "16", "--img-size", "24"], "img_size: expected none with --tile"),
        ("sima", ["--scratch", "."], "scratch: expected none without --tile, got .; leave it out"),
        (
            "sima",
            ["--tile", "16", "--scratch", "nowhere"],
            "scratch: expected a folder, got nowhere; make it",
        ),
    ],
)
def test_tiles_that_are_refused(mechanism, words, sentence, images, tmp_path, capsys):
    write_run(tmp_path / "run", mechanism=mechanism)
    command(tmp_path / "run", images, *words, out=tmp_path / "out.csv", code=2)
    captured = capsys.readouterr()
    assert captured.err.startswith(f"sansmax: {sentence}")
    assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.glob("*out.csv*"))


def test_tiles_without_pyvips_name_the_extra(images, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", mechanism="sima")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    command(tmp_path / "run", images, "--tile", out=tmp_path / "out.csv", code=2)
    assert "pip install sansmax[tiles]" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out.csv*"))

"""A run's folder: what is in it, what is refused, where weights and teachers come from."""

import base64
import errno
import io
import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from forked import tiny
from PIL import Image
from rich.console import Console

from sansmax import maps
from sansmax.cli import main
from sansmax.tasks._data.batches import Decoded
from sansmax.train import checkpoint, images, parallel
from sansmax.train import run as runs
from sansmax.train.network import load_network
from sansmax.train.recipe import Augment, Data, Distil, Recipe
from sansmax.train.run import run

PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 1, "class_token": False}


def small(out, **changes) -> Recipe:
    """Two epochs of five updates on 250 digits."""
    words = {"model_args": SMALL, "drop_path": 0.0, "augment": PLAIN, "batch_size": 50}
    return tiny(out, **words | {"data": Data(num_samples=250)} | changes)


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(runs.artifacts, "report", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole run, with its report."""
    out = tmp_path_factory.mktemp("run") / "a run"
    run(small(out, epochs=3, tensorboard=True), command="sansmax train as given")
    return out


def lines(folder, kind="eval"):
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def content(folder):
    """Every file and its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_what_the_docstring_says(folder):
    found = {path.name for path in folder.iterdir()}
    assert found == {
        *("recipe.json", "metrics.jsonl", "weights.safetensors", "best.safetensors", "evaluation.npz"),
        *("gallery.json", "pictures.json", "states", "report.html", "tensorboard"),
    }
    for name in found - {"skipped.json", "tensorboard"}:
        assert name.rstrip("/") in (run.__doc__ or "")
    info = json.loads((folder / "recipe.json").read_text())
    assert set(info) == {
        *("sansmax", "commit", "command", "recipe", "classes", "data", "network", "machine", "versions"),
        *("started", "best", "task", "figures", "higher", "unit"),
    }
    assert info["command"] == "sansmax train as given"
    assert Recipe.from_json(info["recipe"]) == small(folder, epochs=3, tensorboard=True)
    assert info["classes"] == [str(i) for i in range(10)]
    assert info["data"] | {"split": ""} == {
        "name": "digits (scikit-learn)",
        "train": 250,
        "val": 445,
        "split": "",
    }
    assert info["network"] | {"flops": 0, "mean": 0, "std": 0} == {
        "name": "vit_mini", "params": info["network"]["params"], "flops": 0, "img_size": 8, "in_chans": 1,
        "mean": 0, "std": 0,
    }  # fmt: skip
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    assert info["network"]["params"] == sum(value.numel() for value in weights.values())
    assert info["network"]["flops"] > 0
    assert "digits" in (folder / "report.html").read_text()


def test_the_best_weights_are_those_of_the_best_epoch(folder):
    scores = [line["top1"] for line in lines(folder)]
    assert len(scores) == 3
    for name, epoch in [("best", scores.index(max(scores)) + 1), ("weights", 3)]:
        with safetensors.safe_open(folder / f"{name}.safetensors", "pt") as file:
            told = file.metadata()
        assert told["epoch"] == str(epoch)
        assert told["top1"] == str(scores[epoch - 1])
        assert (told["model"], told["mechanism"], json.loads(told["model_args"])) == (
            "vit_mini",
            "sima",
            SMALL,
        )
    assert json.loads((folder / "recipe.json").read_text())["best"] == max(scores)


def test_a_worse_epoch_leaves_the_best_weights(no_report, monkeypatch, tmp_path):
    train = runs.train

    def falling(model, task, recipe, folder, on_epoch, console):
        def told(point, evaluated, verdicts):
            return on_epoch({**point, "top1": 1 / point["epoch"]}, evaluated, verdicts)

        return train(model, task, recipe, folder, told, console)

    monkeypatch.setattr(runs, "train", falling)
    run(small(tmp_path))
    for name, epoch in [("best", "1"), ("weights", "2")]:
        with safetensors.safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert file.metadata()["epoch"] == epoch


def test_attention_maps_of_the_last_weights_are_in_the_report(folder):
    (told,) = json.loads((folder / "pictures.json").read_text())
    assert told["title"] == "Attention"
    assert told["png"] in (folder / "report.html").read_text()
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(told["png"]))))
    assert strip.shape == (2 * 160 + 4, 6 * 164 - 4, 3)
    network = load_network(str(folder / "weights.safetensors"))
    source = images.open_images(small(folder), parallel.accelerator(small(folder)), Console(quiet=True))
    pixels = next(iter(source.val(0, 1, 6))).images[5]
    shown = maps.picture(pixels, source.mean, source.std, 160)
    weights = maps.attention_map(network.model, pixels, (1, 1))  # a grid of 2 x 2 without a class token
    for row, wanted in enumerate((shown, maps.overlay(shown, weights, (1, 1)))):
        got = strip[row * 164 :][:160, 5 * 164 :]
        assert np.abs(got.astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    assert images.attention(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), source) == []


def test_the_evaluation_and_the_pictures_are_those_of_the_last_epoch(folder):
    found = np.load(folder / "evaluation.npz")
    last = lines(folder)[-1]
    assert found["labels"].shape == found["truth"].shape == (445,)
    assert found["top"].shape == found["probabilities"].shape == (445, 5)
    assert (found["top"][:, 0] == found["labels"]).mean() == pytest.approx(last["top1"])
    assert (found["top"] == found["labels"][:, None]).any(1).mean() == pytest.approx(last["top5"])
    assert -np.log(found["truth"]).mean() == pytest.approx(last["loss"], rel=1e-4)
    assert (np.diff(found["probabilities"], axis=1) <= 0).all()
    pictures = json.loads((folder / "gallery.json").read_text())
    assert [picture["kind"] for picture in pictures] == ["worst"] * 12 + ["best"] * 12
    truths = [picture["truth_probability"] for picture in pictures]
    assert truths[0] == pytest.approx(found["truth"].min(), rel=1e-5)
    assert truths[12] == pytest.approx(found["truth"].max(), rel=1e-5)
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]["png"]))).size == (8, 8)


def test_weights_of_a_run_are_loaded_by_the_folders_name(folder):
    loaded = load_network(str(folder))
    best = safetensors.torch.load_file(folder / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in loaded.model.state_dict().items())
    assert (loaded.classes, loaded.img_size, loaded.in_chans) == ([str(i) for i in range(10)], 8, 1)


def test_tensorboard_can_be_read_and_lines_are_not_doubled_on_going_on(no_report, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = images.save_verdicts

    def crash(*_):
        raise KeyError

    recipe = small(tmp_path, tensorboard=True, save_every=2)
    monkeypatch.setattr(images, "save_verdicts", crash)
    with pytest.raises(KeyError):
        run(recipe)
    monkeypatch.setattr(images, "save_verdicts", kept)
    for path in checkpoint.States(tmp_path / "states").paths()[1:]:
        path.unlink()  # back to update 4
    run(replace(recipe, resume=True))
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "eval/top1", "eval/top5"} <= set(read.Tags()["scalars"])
    for name, kind in [("train/loss", "train"), ("eval/top1", "eval")]:
        written = {line["update"]: line[name.split("/")[1]] for line in lines(tmp_path, kind)}
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert [step for step, _ in found] == list(written)
        assert [value for _, value in found] == pytest.approx(list(written.values()))


def test_a_second_run_in_the_folder_is_refused_and_nothing_changes(folder):
    before = content(folder)
    with pytest.raises(
        ValueError, match=r"out: expected a new folder, got .*a run with a run in it; add --res"
    ):
        run(small(folder))
    assert content(folder) == before


def test_going_on_keeps_what_was_told_of_the_beginning(no_report, monkeypatch, tmp_path):
    out = tmp_path / "x"

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(images, "save_verdicts", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted by SIGTERM: update 6 of 15 is saved in"):
        run(small(out, epochs=3), command="first")
    before = json.loads((out / "recipe.json").read_text())
    monkeypatch.undo()
    monkeypatch.setattr(runs.artifacts, "report", lambda *_: None)
    run(small(out, epochs=3, resume=True, keep=3, accumulate=5), command="second")
    after = json.loads((out / "recipe.json").read_text())
    assert after | {"best": 0} == before | {"best": 0}
    assert after["command"] == "first"
    assert after["best"] == max(line["top1"] for line in lines(out))


def test_weights_count_until_there_is_a_state(no_report, folder, monkeypatch, tmp_path):
    """A run that was killed before it had saved anything begins again with them."""
    recipe = small(tmp_path, weights=str(folder), optim=replace(small("").optim, ema=0.0))

    def killed(*_):
        raise KeyError

    train = runs.train
    monkeypatch.setattr(runs, "train", killed)
    with pytest.raises(KeyError):
        run(recipe)
    seen = []
    monkeypatch.setattr(
        runs, "train", lambda model, *words: seen.append(model.head.weight.clone()) or train(model, *words)
    )
    run(replace(recipe, resume=True))
    best = safetensors.torch.load_file(folder / "best.safetensors")["head.weight"]
    assert torch.equal(seen[0], best)
    with pytest.raises(
        ValueError, match=r"weights: expected '.*', with which .* was begun, got ''; use the same"
    ):
        run(replace(recipe, resume=True, weights=""))


@pytest.mark.parametrize("file", ["", "best.safetensors"])
def test_weights_from_a_run(folder, file):
    recipe = small("x", weights=str(folder / file), img_size=8)
    source = Source(10)
    model = images.network(recipe, source)
    images.load_weights(model, recipe)
    best = safetensors.torch.load_file(folder / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())
    # Of another number of classes: a new head, the rest as it was.
    other = images.network(recipe, Source(7))
    fresh = other.head.weight.clone()
    images.load_weights(other, recipe)
    assert torch.equal(other.head.weight, fresh)
    assert torch.equal(other.blocks[0].attn.qkv.weight, best["blocks.0.attn.qkv.weight"])


class Source:
    """What the network asks of one."""

    def __init__(self, count, mean=(0.5,)):
        self.classes, self.mean, self.std = [str(i) for i in range(count)], mean, tuple(2 * m for m in mean)
        self.title = "test"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_args": {**SMALL, "depth": 2}},
            r"differs in \d+ tensors, such as blocks.1.*; check model, mech",
        ),
        ({"model_args": {**SMALL, "embed_dim": 48}}, r"differs in \d+ tensors, such as blocks.0"),
        (
            {"mechanism": "xnorm"},
            r"weights: expected those of vit_mini as it is built here, got vit_mini with",
        ),
        ({"weights": "/nowhere/x"}, "network: expected a run folder or a file at /nowhere/x, got nothing"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, changes, words):
    recipe = replace(small("x", weights=str(folder), img_size=8), **changes)
    model = images.network(recipe, Source(10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.raises(ValueError, match=words)
        if "nowhere" not in words
        else pytest.raises(OSError, match=words)
    ):
        images.load_weights(model, recipe)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_teacher_is_a_run_and_sees_images_as_it_learned_them(folder):
    recipe = small("x", distil=Distil(teacher=str(folder), kind="soft", alpha=0.3, tau=2.0))
    given = images.teacher(recipe, Source(10), 8, torch.device("cpu"))
    assert (given.kind, given.alpha, given.tau) == ("soft", 0.3, 2.0)
    loaded = load_network(str(folder))
    pixels = torch.rand(3, 1, 8, 8)
    expected = loaded.model((pixels - loaded.mean[0]) / loaded.std[0])
    torch.testing.assert_close(given.opinion((pixels - 0.5) / 1.0)[0], expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in given.model.parameters())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run_learns_from_a_run(no_report, folder, kind, tmp_path):
    outcome = run(small(tmp_path, distil=Distil(teacher=str(folder), kind=kind)))
    assert outcome.skipped == 0
    other = run(small(tmp_path / "alone"))
    assert outcome.curve[0]["loss"] != other.curve[0]["loss"]


def test_a_teacher_of_other_classes_is_refused(folder):
    recipe = small("x", distil=Distil(teacher=str(folder)))
    for source, words in [
        (Source(7), "network: expected one with 7 classes, got vit_mini with sima with 10; give another"),
        (Source(10, (0.5,) * 3), "distil.teacher: expected a network for 3 channels, got .* with 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            images.teacher(recipe, source, 8, torch.device("cpu"))
    named = Source(10)
    named.classes = named.classes[::-1]
    with pytest.raises(
        ValueError, match=r"distil.teacher: expected a network that learned the classes of test in"
    ):
        images.teacher(recipe, named, 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": {"per": "step"}}, "optim.per: expected one of epoch, update, got 'step'"),
        ({"device": "gpu"}, "device: expected one of auto, cpu, cuda, got 'gpu'"),
        ({"distil": Distil(kind="warm")}, "distil.kind: expected one of soft, hard, got 'warm'"),
        ({"augment": Augment(interpolation="cubic")}, "augment.interpolation: expected one of bilinear, bic"),
        ({"model_args": [1]}, "model_args: expected a JSON object such as"),
        ({"model_args": {"depht": 3}}, "model: expected words that vit_mini takes, got .*depht"),
        ({"checkpointing": True, "model": "lenet"}, "unknown name 'lenet'"),
    ],
)
def test_settings_that_do_not_fit_are_named_before_training(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    if isinstance(changes.get("optim"), dict):
        changes = {"optim": replace(small("").optim, **changes["optim"])}
    with pytest.raises(ValueError, match=words):
        run(small(tmp_path, **changes))
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Flatten(), "model: expected a network that classifies images, got vit_mini, which gives"),
        (torch.nn.Linear(7, 10), r"img_size: expected a size that vit_mini takes, got 8 \(.*mat1"),
    ],
)
def test_a_network_that_does_not_classify_is_named_before_training(model, words, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "build", lambda *_, **__: model)
    with pytest.raises(ValueError, match=words):
        run(small(tmp_path))
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"recipe": {}}', "{"])
def test_a_recipe_json_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"^out: expected .* in .*recipe.json, got something else"):
        run(small(tmp_path, resume=True))
    assert (tmp_path / "recipe.json").read_text() == text


def test_a_run_of_an_older_version_goes_on(no_report, tmp_path):
    """A field that did not exist then has its default."""
    run(small(tmp_path))
    info = json.loads((tmp_path / "recipe.json").read_text())
    del info["recipe"]["optim"]["layer_decay"]
    (tmp_path / "recipe.json").write_text(json.dumps(info))
    run(small(tmp_path, resume=True))
    info["recipe"]["optim"]["color"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(info))
    with pytest.raises(
        ValueError, match="recipe: expected fields of this version, got color; use the version"
    ):
        run(small(tmp_path, resume=True))


def test_two_runs_in_one_process_are_two_runs(no_report, tmp_path):
    one, other, third = (
        run(small(tmp_path / name, seed=seed)) for name, seed in [("a", 0), ("b", 1), ("c", 0)]
    )
    assert one.curve == third.curve != other.curve
    a, c = (safetensors.torch.load_file(tmp_path / name / "weights.safetensors") for name in "ac")
    assert all(torch.equal(a[name], c[name]) for name in a)


def command(out, *more):
    """As words of the command line."""
    return [
        *("train", "digits_sima", "--epochs", "2", "--out", str(out), "--device", "cpu"),
        *("--model-args", json.dumps(SMALL), "--data.num-samples", "96", "--log-every", "1", *more),
    ]


def refused(capsys, *words):
    """Exit code 2 and one sentence."""
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    (sentence,) = [line for line in told.splitlines() if line.startswith("sansmax: ")]
    assert "Traceback" not in told
    return sentence


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checkpoint.os, "fsync", no_room)
    told = refused(capsys, *command(tmp_path / "x"))
    assert "out: expected to be able to write" in told
    assert "got 'No space left on device'; make room" in told
    assert list((tmp_path / "x").iterdir()) == []


def test_a_full_disk_in_the_middle_of_a_state(no_report, monkeypatch, capsys, tmp_path):
    out = tmp_path / "x"
    save = torch.save

    def full(state, file):
        if state["position"]["update"] < 3:
            return save(state, file)
        file.write(b"half")
        return save(state, Full())

    class Full(io.RawIOBase):
        def write(self, data):
            no_room()

    monkeypatch.setattr(torch, "save", full)
    told = refused(capsys, *command(out, "--save-every", "1"))
    assert "states/state-000000003.pt, got 'No space left on device'; make room" in told
    assert sorted(path.name for path in (out / "states").iterdir()) == [
        "state-000000001.pt",
        "state-000000002.pt",
    ]
    monkeypatch.setattr(torch, "save", save)
    assert main(command(out, "--save-every", "1", "--resume")) == 0
    assert [line["epoch"] for line in lines(out)] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_pytorch_tells_of_a_full_disk_as_the_system_does():
    with pytest.raises(OSError, match="No space left") as found:
        checkpoint._save({"a": torch.zeros(10**6)}, Path("/dev/full"))
    assert found.value.errno == errno.ENOSPC


def test_a_full_disk_at_a_line_of_metrics(no_report, monkeypatch, capsys, tmp_path):
    opened = Path.open

    def full(self, mode="r", *arguments, **words):
        if self.name == "metrics.jsonl" and mode == "a":
            no_room()
        return opened(self, mode, *arguments, **words)

    monkeypatch.setattr(Path, "open", full)
    assert "metrics.jsonl, got 'No space left on device'; make room" in refused(
        capsys, *command(tmp_path / "x")
    )


def test_a_folder_that_cannot_be_one(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "out: expected a folder, got a file at" in refused(capsys, *command(tmp_path / "file"))
    assert "'Not a directory'" in refused(capsys, *command(tmp_path / "file" / "x"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc, where nobody can write")
def test_a_folder_that_cannot_be_written_to(capsys):
    assert "out: expected to be able to write /proc" in refused(capsys, *command("/proc/sys/kernel"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 12 images each."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in [("day", 200), ("night", 30)]:
        for split, count in [("train", 8), ("val", 4)]:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (17, 13), (colour, number, 0)).save(root / split / name / f"{number}.png")
    return root


def from_files(pictures, out, **changes) -> Recipe:
    data = Data(root=str(pictures), memory=False, workers=1)
    return small(out, **{"data": data, "img_size": 16, "batch_size": 4, "save_every": 1} | changes)


def test_images_from_files_train_and_are_skipped_if_broken(no_report, pictures, tmp_path):
    out = tmp_path / "x"
    broken = pictures / "val" / "day" / "9.png"
    broken.write_bytes(b"no image")
    try:
        outcome = run(from_files(pictures, out, epochs=1))
    finally:
        broken.unlink()
    assert len(outcome.verdicts) == 8
    assert set(outcome.curve[0]) == {"epoch", "loss", "top1", "val_loss"}
    (skipped,) = json.loads((out / "skipped.json").read_text())
    assert skipped["path"].endswith("9.png")


def test_a_worker_that_died_is_named(no_report, monkeypatch, capsys, pictures, tmp_path):
    mine, item = os.getpid(), Decoded.__getitem__

    def deadly(self, key):
        if os.getpid() != mine and self.substitute:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    monkeypatch.setattr(Decoded, "__getitem__", deadly)
    given = shlex.split(from_files(pictures, tmp_path / "x").command())
    told = refused(capsys, *given[1:])
    assert "data.workers: expected processes that decode images to live, got 'DataLoader worker" in told
    assert "lower --data.workers or free memory (also /dev/shm); nothing was saved yet in" in told


def test_nothing_is_drawn_where_there_is_no_terminal(no_report, tmp_path):
    shown = io.StringIO()
    run(small(tmp_path / "a"), Console(file=shown, width=100))
    assert shown.getvalue() == ""
    shown = io.StringIO()
    run(small(tmp_path / "b"), Console(file=shown, width=100, force_terminal=True))
    assert "images/s" in shown.getvalue()
    assert "loss" in shown.getvalue()

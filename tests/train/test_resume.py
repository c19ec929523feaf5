"""A run that was killed goes on as if nothing had happened."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from forked import run_recipe, start, tiny, together
from PIL import Image

from sansmax.train.checkpoint import States
from sansmax.train.guard import Interrupted
from sansmax.train.recipe import Augment, Data
from sansmax.train.run import run

TIMES = ("seconds", "eval_seconds", "images_per_s", "data_wait")


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock said."""
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    together(1, run_recipe, tiny(folder))
    return folder


def killed_at(folder: Path, count: int, number: int = signal.SIGKILL, **changes: Any) -> int:
    """Starts the run, or goes on with it, and kills it after so many lines; returns its exit code."""
    (child,) = start(1, run_recipe, tiny(folder, resume=True, **changes))
    path = folder / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not (path.is_file() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < limit
        assert child.is_alive()
        time.sleep(0.002)
    os.kill(child.pid, number)
    child.join(60)
    return child.exitcode


def test_three_kills_at_random_change_no_loss_and_no_weight(undisturbed, tmp_path):
    folder = tmp_path / "killed"
    chance = random.Random(time.time_ns())
    counts = sorted(chance.sample(range(1, 20), 3))
    for count in counts:
        assert killed_at(folder, count) == -signal.SIGKILL, counts
    together(1, run_recipe, tiny(folder, resume=True))
    assert lines(folder) == lines(undisturbed), counts
    for name in ("weights.safetensors", "best.safetensors"):
        mine, theirs = (safetensors.torch.load_file(f / name) for f in (folder, undisturbed))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), counts


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty small images to train, eight to test, of two classes, as a folder and as shards."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        (root / "shards").mkdir(exist_ok=True)
        writers = [webdataset.TarWriter(str(root / "shards" / f"{split}-{i}.tar")) for i in range(4)]
        for i in range(count):
            label = i % 2
            path = root / "folder" / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 128 + 127 * label, (20, 24, 3), dtype=np.uint8)).save(path)
            writers[i % 4].write({"__key__": f"{i:03d}", "png": path.read_bytes(), "cls": str(label)})
        for writer in writers:
            writer.close()
    return root


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_kill_changes_nothing_where_workers_decode(pictures, tmp_path, kind):
    changes = {
        "data": Data(
            root=str(pictures / kind),
            memory=False,
            workers=2,
            num_samples=40,
            num_classes=2,
            shuffle_buffer=16,
        ),
        "augment": Augment(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, mixup=0.8),
        "img_size": 16,
        "batch_size": 8,
        "epochs": 3,
        "save_every": 2,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    together(1, run_recipe, tiny(whole, **changes))
    assert len(lines(whole)) == 18
    assert killed_at(killed, random.Random(time.time_ns()).randrange(2, 17), **changes) == -signal.SIGKILL
    together(1, run_recipe, tiny(killed, resume=True, **changes))
    assert lines(killed) == lines(whole)


def test_a_finished_run_that_goes_on_only_evaluates(undisturbed, tmp_path):
    folder = tmp_path / "twice"
    together(1, run_recipe, tiny(folder))
    before = lines(folder)
    together(1, run_recipe, tiny(folder, resume=True))
    assert lines(folder) == before == lines(undisturbed)


def test_a_state_that_was_cut_off_is_passed_over(undisturbed, tmp_path):
    folder = tmp_path / "cut"
    assert killed_at(folder, 8) == -signal.SIGKILL
    *_, older, newest = States(folder / "states").paths()
    newest.write_bytes(newest.read_bytes()[:1000])
    (folder / "states" / f".{newest.name}-tmp").write_bytes(b"half")
    together(1, run_recipe, tiny(folder, resume=True))
    assert lines(folder) == lines(undisturbed)
    assert not list((folder / "states").glob(".state*"))
    assert older.name < newest.name


def test_the_last_states_are_kept_and_older_ones_go(undisturbed):
    assert [path.name for path in States(undisturbed / "states").paths()] == [
        "state-000000018.pt",
        "state-000000020.pt",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(undisturbed, tmp_path, number):
    folder = tmp_path / "signalled"

    def leave(recipe):
        try:
            run(recipe)
        except Interrupted as stop:
            (folder / "said").write_text(str(stop))
            raise SystemExit(1) from None

    (child,) = start(1, leave, tiny(folder, save_every=None))
    path = folder / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= 4):
        time.sleep(0.002)
    os.kill(child.pid, number)
    child.join(60)
    said = (folder / "said").read_text()
    seen = len(lines(folder))
    assert said == (
        f"interrupted by {signal.Signals(number).name}: update {seen} of 20 is saved in {folder}, go on "
        "with --resume"
    )
    together(1, run_recipe, tiny(folder, save_every=None, resume=True))
    assert lines(folder) == lines(undisturbed)


def test_what_must_not_change_is_named(undisturbed):
    for changes, words in [
        ({"batch_size": 64}, "batch_size: expected 128, with which .* was begun, got 64; use the same"),
        ({"optim": replace(tiny(undisturbed).optim, lr=1.0)}, "optim.lr: expected 0.003, .* got 1.0"),
        ({"resume": False}, "out: expected a new folder, got .* with a run in it; add --resume"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(tiny(undisturbed, **{"resume": True} | changes))


def test_a_state_of_another_network_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "other"
    recipe = tiny(folder, model_args={**tiny(folder).model_args, "depth": 1})
    together(1, run_recipe, replace(recipe, epochs=1))
    path = States(folder / "states").paths()[-1]
    state = torch.load(States(undisturbed / "states").paths()[-1], weights_only=True)
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"resume: expected the state of this network and optimiser in .*, got "
    ):
        run(replace(recipe, epochs=1, resume=True))


def test_no_readable_state_is_an_error_not_a_new_beginning(tmp_path):
    folder = tmp_path / "broken"
    together(1, run_recipe, tiny(folder, epochs=1))
    for path in States(folder / "states").paths():
        path.write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"resume: expected a readable state in .*, got state-000000010.pt \("
    ):
        run(tiny(folder, epochs=1, resume=True))

"""`sansmax train` as a user meets it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tyro

from sansmax import recipes
from sansmax.cli import main
from sansmax.train import artifacts, images
from sansmax.train.recipe import Augment, Data, Distil, Optim, Recipe

SMALL = ["--model-args", '{"patch_size": 4, "embed_dim": 24, "depth": 1, "class_token": false}']
SHORT = [*SMALL, "--data.num-samples", "192", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(artifacts, "report", lambda *_: None)


def test_a_recipe_trains_and_tells_what_it_reached(capsys, tmp_path):
    out = tmp_path / "my run"
    assert main(["train", "digits_sima", "--epochs", "1", "--out", str(out), *SHORT]) == 0
    told = capsys.readouterr()
    info = json.loads((out / "recipe.json").read_text())
    (evaluation,) = (
        json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines() if '"eval"' in text
    )
    assert told.out.startswith(f"{out}: top-1 {100 * evaluation['top1']:.1f} %, top-5 ")
    assert told.out.rstrip().endswith("images/s")
    assert told.err == (
        "optim.warmup: the rate still rises when the run of 1 epochs ends, because it warms up for 1.4\n"
    )
    assert shlex.split(info["command"])[:3] == ["sansmax", "train", "digits_sima"]
    assert parsed(info["command"]) == Recipe.from_json(info["recipe"])


def test_help_of_a_recipe_shows_its_docstring_and_every_flag(capsys):
    assert main(["train", "digits_sima", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: sansmax train digits_sima" in told
    for sentence in ("A small ViT with any mechanism", "Cost: ", "To reach: top-1"):
        assert sentence in told
    for flag in (
        "--epochs",
        "--optim.lr",
        "--data.root",
        "--augment.mixup",
        "--distil.teacher",
        "--no-resume",
    ):
        assert flag in told
    assert "(default: 14)" in told  # the recipe's epochs
    assert main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 300)" in told
    assert "best.safetensors" in told


def test_the_recipes_are_listed(capsys):
    assert main(["train", "--recipes"]) == 0
    assert capsys.readouterr().out.split() == recipes.names()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits_simma"], "unknown name 'digits_simma' in recipes: .*did you mean 'digits_sima'"),
        (["digits_sima", "--epochs", "0"], "epochs: expected a whole number of at least 1, got 0"),
        (["digits_sima", "--optim.lr", "nan"], "optim.lr: expected a number above 0, got nan"),
        (
            ["digits_sima", "--optim.opt", "adamww"],
            "unknown name 'adamww' in optimisers: .*did you mean 'adamw'",
        ),
        (["digits_sima", "--device", "cuda"], "device: expected a GPU that PyTorch sees, got none"),
        (["digits_sima", "--parallel", "fsdp"], "parallel: expected several processes for fsdp, got one"),
    ],
)
def test_a_mistake_is_a_sentence(words, told, capsys, tmp_path):
    assert main(["train", *words, "--out", str(tmp_path / "x"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert re.search(f"sansmax: {told}", error), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [
        ["--epoch5", "3"],
        ["--epochs", "many"],
        ["--model-args", "{bad"],
        ["--model-args", "[1]"],
        ["--optim.per", "x"],
    ],
)
def test_words_that_cannot_be_read_leave_with_2(words, capsys, tmp_path):
    assert main(["train", "digits_sima", "--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert error
    assert "Traceback" not in error
    assert not (tmp_path / "x" / "recipe.json").exists()


def parsed(command, name=None):
    """The recipe that a command line gives."""
    words = shlex.split(command)[2:]
    base = recipes.recipe(words[0]) if words and not words[0].startswith("-") else None
    return tyro.cli(Recipe, default=base or Recipe(), args=words[1:] if base else words)


AWKWARD = [
    Recipe(),
    Recipe(
        out='a folder/it\'s "mine"', model_args={"depth": 3, "name": "a b", "on": True, "x": None, "y": [1]}
    ),
    Recipe(data=Data(root="/data/ImageNet 1k", memory=True, num_samples=7, download=True)),
    Recipe(data=Data(memory=False), save_every=None, img_size=224, mechanism="sima", weights="a=b c.pth"),
    Recipe(compile=True, checkpointing=True, channels_last=True, tensorboard=True, resume=True),
    Recipe(augment=Augment(scale=(0.2, 1.0), ratio=(1.0, 1.0), auto_augment="rand-m9-mstd0.5-inc1")),
    Recipe(optim=Optim(betas=(0.9, 0.95), clip=1e-3, lr_batch=None, lr=1e-7, evaluate_ema=False, ema=0.9999)),
    Recipe(distil=Distil(teacher="a run/x", kind="soft", tau=2.5), precision="bf16", parallel="fsdp"),
    Recipe(eval_crop=1.0, drop_path=0.1, wandb="my project", out="-x"),
]


@pytest.mark.parametrize("recipe", AWKWARD)
def test_the_command_gives_the_recipe(recipe):
    assert parsed(recipe.command()) == recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"save_every": None, "mechanism": None, "img_size": None, "model_args": {}},
        {"optim": replace(recipes.recipe("digits_sima").optim, clip=None, betas=(0.8, 0.9))},
        {"optim": replace(recipes.recipe("digits_sima").optim, evaluate_ema=False, layer_decay=0.7)},
    ],
)
def test_the_command_of_a_changed_recipe_names_what_changed(changes):
    base = recipes.recipe("digits_sima")
    command = replace(base, **changes).command("digits_sima", base)
    assert command.startswith("sansmax train digits_sima --")
    assert parsed(command) == replace(base, **changes)
    assert base.command("digits_sima", base) == "sansmax train digits_sima"


def test_booleans_and_tuples_go_back_to_their_defaults():
    base = Recipe(compile=True, resume=True, optim=Optim(evaluate_ema=False, betas=(0.5, 0.6), clip=2.0))
    wanted = Recipe()
    words = shlex.split(wanted.command(None, base))[2:]
    assert tyro.cli(Recipe, default=base, args=words) == wanted


def test_a_recipe_survives_json():
    for recipe in AWKWARD:
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(
        ValueError, match="recipe: expected fields of this version, got colour; use the version"
    ):
        Recipe.from_json({"colour": 1})


def test_going_on_without_a_word_more_uses_the_weights_of_the_recipe():
    """A named recipe that begins with weights is resumed by its name."""
    assert Recipe(weights="x", resume=True).checked().weights == "x"


def test_ctrl_c_leaves_with_130(monkeypatch, capsys, tmp_path):
    out = tmp_path / "SIGTERM"
    monkeypatch.setattr(images, "save_verdicts", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["train", "digits_sima", "--epochs", "2", "--out", str(out), *SHORT]) == 130
    assert capsys.readouterr().err == (
        f"sansmax: interrupted by SIGINT: update 5 of 8 is saved in {out}, go on with --resume\n"
    )


def test_sigterm_leaves_with_143_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "x"
    words = ["train", "digits_sima", "--epochs", "500", "--out", str(out), "--log-every", "1", *SHORT]
    child = subprocess.Popen(
        [sys.executable, "-m", "sansmax", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path, limit = out / "metrics.jsonl", time.monotonic() + 90
    while not (path.is_file() and path.read_text().count("\n") >= 3):
        assert child.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    child.terminate()
    _, error = child.communicate(timeout=60)
    assert child.returncode == 143
    newest = max(path.name for path in (out / "states").iterdir())
    update = int(newest.removeprefix("state-").removesuffix(".pt"))
    told = f"sansmax: interrupted by SIGTERM: update {update} of 2000 is saved in {out}, go on with --resume"
    assert error.splitlines() == [told]

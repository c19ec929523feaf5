"""`sansmax adapt`: another attention in a trained network, and the receipt."""

import json
from dataclasses import replace

import pytest
import torch
from forked import tiny
from torch import nn

import sansmax
from sansmax import layers
from sansmax.cli import main
from sansmax.tasks.classification import Teacher
from sansmax.train import adapt as adapting
from sansmax.train import artifacts, parallel
from sansmax.train.adapt import Adapt, adapt, recipe_of
from sansmax.train.evaluate import evaluate
from sansmax.train.network import load_network
from sansmax.train.recipe import Augment, Data, Recipe
from sansmax.train.run import run

PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
SMALL = {"patch_size": 2, "embed_dim": 24, "depth": 3, "class_token": False}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Softmax's run on the digits."""
    out = tmp_path_factory.mktemp("adapt") / "teacher"
    words = {"model_args": SMALL, "mechanism": "softmax", "drop_path": 0.0, "augment": PLAIN}
    run(tiny(out, batch_size=50, epochs=6, **words))
    return str(out)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(artifacts, "report", lambda *_: None)


def following(teacher, out, **changes) -> Recipe:
    return replace(recipe_of(load_network(teacher), teacher), epochs=2, out=str(out), device="cpu", **changes)


@pytest.fixture(scope="module")
def adapted(teacher, tmp_path_factory):
    """A receipt, the folder it is in, and the settings."""
    out = tmp_path_factory.mktemp("adapt") / "sima"
    how = Adapt(keep=1, layer_updates=60, sizes=(8, 12))
    return adapt(teacher, "sima", how, following(teacher, out)), out, how


class Held:
    """The held-out digits as `evaluate` takes them."""

    def __init__(self):
        from sansmax.tasks._data import load_images

        self.images = load_images("digits", 8)
        self.classes = self.images.classes

    def __len__(self):
        return len(self.images.val_labels)

    def name(self, index):
        return str(index)

    def picture(self, index):
        from PIL import Image

        return Image.fromarray(self.images.val_images[index][0].numpy()).convert("RGB"), int(
            self.images.val_labels[index]
        )


def test_accuracies_are_those_that_eval_finds(teacher, adapted):
    receipt, out, _ = adapted
    found = receipt["accuracy"]
    assert found["before"] == pytest.approx(evaluate(load_network(teacher), Held())["top1"], abs=1e-9)
    assert found["whole"] == pytest.approx(evaluate(load_network(str(out)), Held())["top1"], abs=1e-9)
    start = load_network(str(out / "start.safetensors"))
    assert found["layers"] == pytest.approx(evaluate(start, Held())["top1"], abs=1e-9)
    swapped, _ = sansmax.swap(load_network(teacher).model, "sima")
    at_once = evaluate(replace(load_network(teacher), model=swapped.eval()), Held())["top1"]
    assert found["at_once"] == pytest.approx(at_once, abs=1e-9)
    # Learning from the layers wins back most of what the change lost.
    assert found["before"] - found["layers"] < 0.5 * (found["before"] - found["at_once"])


def test_the_dearest_layer_stays_and_the_network_is_built_again(teacher, adapted):
    receipt, out, how = adapted
    cost = {layer["name"]: layer["cost"] for layer in receipt["layers"]}
    kept = [layer["name"] for layer in receipt["layers"] if layer["kept"]]
    assert len(kept) == how.keep == 1
    assert cost[kept[0]] == max(cost.values())
    assert receipt["swap"]["layers"] == [name for name in cost if name not in kept]
    for network in (load_network(str(out)), load_network(str(out / "start.safetensors"))):
        for name in cost:
            kind = layers.Softmax if name in kept else layers.SimA
            assert type(network.model.get_submodule(name)) is kind
        assert network.name == "vit_mini with softmax and sima swapped in"
    # The layers' part changes nothing but the layers.
    old = load_network(teacher).model.state_dict()
    for key, value in load_network(str(out / "start.safetensors")).model.state_dict().items():
        if not key.startswith(tuple(receipt["swap"]["layers"])):
            assert torch.equal(value, old[key]), key
    assert all(layer["after"] < layer["before"] for layer in receipt["layers"])
    for layer in receipt["layers"]:
        assert layer["cost"] == pytest.approx(receipt["accuracy"]["before"] - layer["alone"], abs=1e-9)


def test_the_receipt_is_kept_and_says_it_in_words(adapted):
    receipt, out, _ = adapted
    assert json.loads((out / "receipt.json").read_text()) == json.loads(json.dumps(receipt))
    page = (out / "receipt.md").read_text()
    for figure in receipt["accuracy"].values():
        assert f"{100 * figure:.2f}" in page
    assert [row["img_size"] for row in receipt["speed"]] == [8, 12]
    assert "skipped" not in receipt["speed"][0]
    assert receipt["speed"][0]["ms"]["before"]["median"] > 0
    assert receipt["speed"][1]["peak_mb"]["after"] > receipt["speed"][0]["peak_mb"]["after"] > 0
    assert "stayed" in page


def test_what_was_begun_goes_on_without_learning_the_layers_again(teacher, tmp_path, monkeypatch):
    out, how = tmp_path / "run", Adapt(layer_updates=5, sizes=(8,))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapting, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(teacher, "xnorm", how, following(teacher, out))
    with pytest.raises(ValueError, match=r"out: expected a new folder, got .* with receipt.json"):
        adapt(teacher, "xnorm", how, following(teacher, out))
    with pytest.raises(ValueError, match=r"mechanism: expected 'xnorm', with which .*, got 'sima'; use the"):
        adapt(teacher, "sima", how, following(teacher, out, resume=True))
    monkeypatch.setattr(adapting, "recover_layers", None)
    receipt = adapt(teacher, "xnorm", how, following(teacher, out, resume=True))
    again = adapt(teacher, "xnorm", how, following(teacher, out, resume=True))
    assert again["accuracy"] == receipt["accuracy"]


def test_layers_alone_leave_a_network_that_loads(teacher, tmp_path):
    receipt = adapt(
        teacher, "aft_simple", Adapt(layer_updates=0, whole=False, sizes=(8,)), following(teacher, tmp_path)
    )
    assert "whole" not in receipt["accuracy"]
    assert type(load_network(str(tmp_path)).model.blocks[0].attn) is layers.AFTSimple
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("how", "changes", "words"),
    [
        ({"keep": 3}, {}, "keep: expected less than the 3 layers that can be replaced, got 3; lower it"),
        ({"keep": -1}, {}, "keep: expected a whole number of at least 0, got -1"),
        ({"layers": ("nothing.*",)}, {}, "layers: expected numbers below 3 or patterns of blocks.0.attn"),
        ({"layer_lr": 0.0}, {}, "layer_lr: expected a number above 0"),
        ({"sizes": (3,)}, {}, "sizes: expected a whole number of at least 8, got 3"),
        ({}, {"img_size": 7}, "img_size: expected a size that vit_mini with softmax takes, got 7"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_leaves_nothing(teacher, tmp_path, how, changes, words):
    with pytest.raises(ValueError, match=words):
        adapt(teacher, "sima", Adapt(**how), following(teacher, tmp_path / "out", **changes))
    assert not list(tmp_path.glob("out/*"))


def test_data_that_the_network_did_not_learn_are_refused(teacher, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / split / name / f"{number}.png")
    other = following(teacher, tmp_path / "out", img_size=8, data=Data(root=str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"network: expected one with the 2 classes of .*, got vit_mini with"
    ):
        adapt(teacher, "sima", Adapt(), other)


def test_several_processes_are_refused(teacher, tmp_path, monkeypatch):
    class Two:
        num_processes = 2

    monkeypatch.setattr(parallel, "accelerator", lambda _: Two())
    with pytest.raises(ValueError, match="adapt: expected one process, got 2"):
        adapt(teacher, "sima", Adapt(), following(teacher, tmp_path))


def test_the_command(teacher, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--epochs", "1", "--layer-updates", "4", "--sizes", "8", "--keep", "1", "--out", str(out)]
    assert main(["adapt", teacher, "sima", *words]) == 0
    assert capsys.readouterr().out == (out / "receipt.md").read_text()
    info = json.loads((out / "recipe.json").read_text())
    assert info["command"].startswith("sansmax adapt ")
    assert info["recipe"]["keep"] == Recipe.keep  # of states
    assert info["recipe"]["distil"] == {
        "teacher": teacher,
        "kind": "soft",
        "alpha": 0.9,
        "tau": 1.0,
        "features": 1.0,
    }
    assert info["recipe"]["epochs"] == 1
    for words, told in (
        ([teacher], "mechanism: expected a network and a mechanism"),
        ([], "network: expected a network and a mechanism"),
        ([teacher, "simma"], "unknown name 'simma' in layers"),
        (["/nowhere/run", "sima"], "network: expected a run folder or a file at /nowhere/run, got nothing"),
        ([teacher, "sima", "--out", str(out)], "out: expected a new folder"),
    ):
        assert main(["adapt", *words]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error


class Pooled(nn.Module):
    def __init__(self, width=6, classes=4):
        super().__init__()
        self.fc = nn.Linear(width, classes)
        self.width = width

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.fc(images.flatten(1)[:, : self.width])


def test_features_are_learned_by_hand():
    torch.manual_seed(0)
    master, student = Pooled(), Pooled().train()
    teacher = Teacher(master, "soft", alpha=0.5).imitated(student, master, 2.0)
    seen = torch.randn(5, 3, 4, 4)
    wanted, given = seen.flatten(1)[:, :6], (seen + 1).flatten(1)[:, :6]
    logits, features = teacher.opinion(seen)
    torch.testing.assert_close(logits, master(seen))
    student(seen + 1)
    expected = (given - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
    torch.testing.assert_close(teacher.distance(features), expected)
    # An average of the student is evaluated between the two, and changes nothing.
    import copy

    _, features = teacher.opinion(seen)
    student(seen + 1)
    copy.deepcopy(student).eval()(seen)
    torch.testing.assert_close(teacher.distance(features), expected)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"features are 6 wide, got 5; leave it out"):
        Teacher(Pooled(5)).imitated(Pooled(), Pooled(5), 1.0)
    with pytest.raises(ValueError, match="expected networks with one linear classifier, got Linear"):
        Teacher(Pooled()).imitated(nn.Linear(2, 2), Pooled(), 1.0)

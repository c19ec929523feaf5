"""sansmax compare: what it writes, what an interruption leaves, what it says to bad input."""

import errno
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sansmax import layers
from sansmax.bench.measure import count_flops
from sansmax.cli import main
from sansmax.models import create_model
from sansmax.train import checkpoint
from sansmax.train import compare as module
from sansmax.train.compare import CompareConfig, compare


@pytest.fixture
def photos(tmp_path):
    """Dark and light images of 16 pixels, 12 of each."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def config(photos, tmp_path):
    return CompareConfig(
        str(photos),
        ("external", "sima"),
        epochs=2,
        img_size=16,
        patch_size=8,
        batch_size=10,
        out=str(tmp_path / "out"),
        sweep=False,
    )


@pytest.fixture
def trained(monkeypatch):
    """Counts the runs; `trained.stop` (a mechanism) presses Ctrl-C in its second epoch. Draws no report."""
    real, runs = module.train, []

    def train(model, task, recipe, on_epoch):
        mixer = next(m for m in model.modules() if isinstance(m, layers.Mixer))
        name = next(n for n, layer in layers.mechanisms().items() if type(mixer) is layer)

        def tick(point, *evaluated):
            if name == train.stop and point["epoch"] == 2:
                raise KeyboardInterrupt
            on_epoch(point, *evaluated)

        outcome = real(model, task, recipe, on_epoch=tick)
        runs.append((name, recipe.seed))
        return outcome

    train.stop, train.runs = None, runs
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "render", lambda results, gallery: "")
    return train


def replace(config, **changes):
    return CompareConfig(**{**vars(config), **changes})


def test_everything_of_a_run_is_written(config, tmp_path):
    (tmp_path / "photos" / "dark" / "broken.png").write_bytes(b"x")
    results = compare(config)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        *("config.json", "results.json", "report.html", "softmax.json", "external.json", "sima.json")
    }
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "<html" in (out / "report.html").read_text()
    assert list(results["mechanisms"]) == ["softmax", "external", "sima"]
    assert results["config"]["seeds"] == (0,)
    assert results["config"]["device"] in ("cpu", "cuda")
    assert (results["data"]["train"], results["data"]["val"]) == (20, 4)
    assert [entry["path"] for entry in results["data"]["skipped"]] == ["dark/broken.png"]
    for name, mechanism in results["mechanisms"].items():
        (run,) = mechanism["runs"]
        assert len(run["predictions"]) == 4
        right = sum(p == t for p, t in zip(run["predictions"], [0, 0, 1, 1], strict=True))
        assert run["accuracy"] == run["curve"][-1]["accuracy"] == mechanism["accuracy"]["mean"] == 25 * right
        assert [point["epoch"] for point in run["curve"]] == [1, 2]
        assert mechanism["title"] == layers.mechanism(name).traits.title
        assert mechanism["latency_ms"]["low"] <= mechanism["latency_ms"]["median"]
        assert mechanism["peak_memory_mb"] > 0
        assert mechanism["params"] > 300_000
        assert mechanism["flops"] > 1_000_000
        assert mechanism["sweep"] == []


def test_an_interruption_keeps_what_is_finished(config, tmp_path, trained):
    trained.stop = "external"
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 mechanisms are finished .* goes on with external"):
        compare(config)
    assert trained.runs == [("softmax", 0)]
    assert not (out / "external.json").exists()
    before = json.loads((out / "softmax.json").read_text())["runs"]
    trained.stop = None
    results = compare(config)
    assert trained.runs == [("softmax", 0), ("external", 0), ("sima", 0)]
    assert results["mechanisms"]["softmax"]["runs"] == before
    compare(config)
    assert len(trained.runs) == 3


def test_a_continued_run_equals_an_uninterrupted_one(config, tmp_path, trained):
    whole = compare(config)
    trained.stop = "sima"
    apart = replace(config, out=str(tmp_path / "apart"))
    with pytest.raises(KeyboardInterrupt):
        compare(apart)
    trained.stop = None
    joined = compare(apart)
    for name, mechanism in whole["mechanisms"].items():
        for key in ("curve", "predictions"):
            assert mechanism["runs"][0][key] == joined["mechanisms"][name]["runs"][0][key]


def test_more_seeds_and_mechanisms_can_be_added(config, trained):
    compare(replace(config, mechanisms=("sima",)))
    results = compare(replace(config, mechanisms=("sima", "xnorm"), seeds=(0, 5)))
    assert trained.runs == [
        ("softmax", 0),
        ("sima", 0),
        ("softmax", 5),
        ("sima", 5),
        ("xnorm", 0),
        ("xnorm", 5),
    ]
    sima = results["mechanisms"]["sima"]
    accuracies = [run["accuracy"] for run in sima["runs"]]
    assert [run["seed"] for run in sima["runs"]] == [0, 5]
    assert sima["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert sima["accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert sima["accuracy"]["min"] == min(accuracies)
    fewer = compare(replace(config, mechanisms=("sima",)))["mechanisms"]
    assert list(fewer) == ["softmax", "sima"]
    assert [run["seed"] for run in fewer["sima"]["runs"]] == [0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.001}, r"expected lr 0\.002, with which .*out was begun, got 0\.001; use the same"),
        ({"epochs": 1}, "expected epochs 2, with which"),
        ({"data": "digits"}, "expected data '.*photos', with which .* got 'digits'"),
    ],
)
def test_other_settings_do_not_mix(config, trained, changes, said):
    compare(replace(config, mechanisms=("softmax",)))
    with pytest.raises(ValueError, match=said):
        compare(replace(config, **changes))
    assert len(trained.runs) == 1


def test_another_version_does_not_mix(config, monkeypatch):
    compare(replace(config, mechanisms=("softmax",)))
    monkeypatch.setattr("sansmax.train._config.__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"expected sansmax '.*', with which .* got '9\.9\.9'"):
        compare(config)


def test_the_sweep_is_bounded_by_softmax_and_kept(config, monkeypatch):
    asked = []

    def sweep(name, *, dim, num_heads, device, max_tokens):
        asked.append((name, dim, num_heads, max_tokens))
        factor = 1 if name == "softmax" else 2 if name == "external" else 0.5
        return [{"tokens": n, "latency_ms": factor * n, "memory_mb": 1.0} for n in (64, 121)]

    monkeypatch.setattr(module, "sweep", sweep)
    results = compare(replace(config, sweep=True))
    assert asked == [("softmax", 96, 3, None), ("external", 96, 3, 121), ("sima", 96, 3, 121)]
    found = {name: m["crossover_tokens"] for name, m in results["mechanisms"].items()}
    assert found == {"softmax": None, "external": None, "sima": 64}
    assert compare(replace(config, sweep=True))["mechanisms"]["sima"]["sweep"][1]["tokens"] == 121
    assert len(asked) == 3


def test_flops_are_two_for_each_multiply_add():
    model = create_model("vit_mini", "softmax", img_size=20, patch_size=4, in_chans=3, num_classes=7)
    tokens, dim = 25 + model.num_prefix_tokens, 96
    block = 2 * tokens * dim * dim * (4 + 2 * 4) + 2 * 2 * tokens * tokens * dim
    expected = 2 * 25 * (3 * 16) * dim + 4 * block + 2 * dim * 7
    assert count_flops(model, torch.zeros(1, 3, 20, 20)) == expected
    other = create_model("vit_mini", "aft_simple", img_size=20, patch_size=4, in_chans=3, num_classes=7)
    rest = expected - 4 * layers.Softmax(96, 3).flops(tokens)
    assert count_flops(other, torch.zeros(1, 3, 20, 20)) == rest + 4 * layers.AFTSimple(96, 3).flops(tokens)


def test_the_command_says_what_differs_from_the_defaults():
    assert CompareConfig().command() == ["sansmax", "compare"]
    config = CompareConfig("a b", ("sima", "soft"), img_size=32, seeds=(0, 1), sweep=False)
    assert config.command() == [
        *("sansmax", "compare", "--data", "a b", "--mechanisms", "sima", "soft"),
        *("--img-size", "32", "--seeds", "2", "--no-sweep"),
    ]
    assert CompareConfig(seeds=(4, 2)).command()[2:] == ["--seeds", "4", "2"]


def run(capsys, *words):
    code = main(["compare", *map(str, words)])
    return code, capsys.readouterr()


def test_the_command_prints_the_table(photos, tmp_path, capsys):
    words = ("--data", photos, "--img-size", 16, "--epochs", 1, "--out", tmp_path / "out", "--no-sweep")
    code, printed = run(capsys, *words, "--mechanisms", "aft-simple", "--seeds", 2)
    assert code == 0
    assert "aft_simple" in printed.out
    assert "report.html" in printed.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["seed"] for r in results["mechanisms"]["aft_simple"]["runs"]] == [0, 1]
    assert results["command"][:3] == ["sansmax", "compare", "--data"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--mechanisms simaa", "unknown name 'simaa' in mechanisms: expected one of .* did you mean 'sima'?"),
        ("--trunk vit_mimi", "unknown name 'vit_mimi' in trunks.*did you mean 'vit_mini'?"),
        ("--data {tmp}/none", "expected an image folder, got nothing at .*none"),
        ("--data {tmp}/photos/dark", "expected at least two class folders in .*dark, got none"),
        ("--epochs 0", "epochs: expected a whole number of at least 1, got 0"),
        ("--img-size -3", "img_size: expected a whole number of at least 1, got -3"),
        ("--batch-size 0", "batch_size: expected a whole number of at least 1, got 0"),
        (
            "--patch-size 5",
            r"patch_size: expected a divisor of the image size 8, got 5; use one of \[1, 2, 4, 8\]",
        ),
        ("--lr 0", "lr: expected a learning rate above 0, got 0"),
        ("--lr nan", "lr: expected a learning rate above 0, got nan"),
        ("--seeds 0", "seeds: expected a count of at least 1, got 0"),
        ("--seeds 3 3", r"seeds: expected different whole numbers of at least 0, got \[3, 3\]"),
        ("--device tpu", "device: expected auto, cpu or, .* got 'tpu'"),
        ("--out {tmp}/photos/dark/0.png", "out: expected a folder, got a file at .*0.png"),
        ("--epochs three", ""),
    ],
)
def test_bad_input_is_one_sentence(photos, tmp_path, capsys, words, said):
    out = () if "--out" in words else ("--out", tmp_path / "out")
    code, printed = run(capsys, *words.format(tmp=tmp_path).split(), *out)
    assert code == 2
    assert "Traceback" not in printed.err
    if said:
        (line,) = printed.err.strip().splitlines()
        assert line.startswith("sansmax: ")
        with pytest.raises(ValueError, match=said):
            raise ValueError(line)


def test_corrupt_images_only(photos, tmp_path, capsys):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"x")
    code, printed = run(capsys, "--data", photos, "--out", tmp_path / "out")
    assert code == 2
    assert "24 files could not be decoded" in printed.err


def test_a_broken_file_of_an_earlier_run(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{")
    code, printed = run(capsys, "--out", tmp_path / "out")
    assert code == 2
    assert "expected JSON in" in printed.err


def test_a_rate_that_is_too_high_keeps_what_is_finished(photos, tmp_path, capsys, monkeypatch):
    real, spoilt = module.Classification.loss, []

    def loss(self, outputs, targets):
        return real(self, outputs, targets) * (float("nan") if spoilt else 1.0)

    monkeypatch.setattr(module.Classification, "loss", loss)
    words = ("--data", photos, "--img-size", 16, "--epochs", 1, "--out", tmp_path / "out", "--no-sweep")
    assert run(capsys, *words, "--mechanisms", "softmax")[0] == 0
    spoilt.append(True)
    code, printed = run(capsys, *words, "--mechanisms", "sima")
    assert code == 2
    assert re.search(
        r"sansmax: sima: training: expected finite losses .* lower --lr; nothing was saved", printed.err
    )
    assert (tmp_path / "out" / "softmax.json").exists()


def test_a_full_disk_is_noticed_before_training(photos, tmp_path, capsys, monkeypatch, trained):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    code, printed = run(capsys, "--data", photos, "--out", tmp_path / "out")
    assert code == 2
    (line,) = printed.err.strip().splitlines()
    assert "got 'No space left on device'; make room" in line
    assert trained.runs == []


def test_ctrl_c_says_how_to_go_on(photos, tmp_path, capsys, trained):
    trained.stop = "sima"
    words = ("--data", photos, "--img-size", 16, "--epochs", 2, "--out", tmp_path / "out", "--no-sweep")
    code, printed = run(capsys, *words, "--mechanisms", "sima")
    assert code == 130
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("sansmax: interrupted: 1 of 2 mechanisms are finished and kept in")
    assert last.endswith("the same command goes on with sima")


def test_memory_that_does_not_suffice_is_a_sentence(config, monkeypatch):
    def train(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(
        ValueError, match=r"softmax: expected a batch that fits .* 3 GiB'; lower --batch-size"
    ):
        compare(config)

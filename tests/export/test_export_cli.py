"""`sansmax export`: runs, files and names into a folder, and its sentences."""

import json
import os
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sansmax.cli import main
from sansmax.tasks import chars, segmentation
from sansmax.tasks._recipes import chars as chars_recipe
from sansmax.tasks._recipes import segmentation as segmentation_recipe
from sansmax.train.network import load_network
from test_predict import CLASSES, picture, write_run

ONNX = ["--format", "onnx", "--latency", "0"]


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", mechanism="sima")
    return tmp_path / "run"


def write_task(folder, module, recipe, classes):
    """The folder of a run of another task, with random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    told = {"task": recipe.task, "recipe": json.dumps(recipe.to_json()), "classes": json.dumps(classes)}
    save_file(module.build(recipe, classes).state_dict(), folder / "best.safetensors", told)
    return folder


def write_pictures(root, classes=CLASSES, each=2):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(each):
            picture(10 * i + k, (40, 30)).save(root / name / f"{k}.png")
    return root


def test_a_run_in_eight_bits_and_a_consumer_who_has_the_file_alone(run, tmp_path, capsys):
    data = write_pictures(tmp_path / "data" / "val")
    (data / "ant" / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "graphs"
    words = ["--int8", "--calibration", str(data), "--calibration-images", "9"]
    words += ["--data.root", str(tmp_path / "data"), "--data.split", "val", "--data.workers", "0"]
    assert main(["export", str(run), "--out", str(out), *words, "--latency", "0.05", "--format", "onnx"]) == 0
    told = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert told.startswith(f"{out}: vit_mini with sima, ")
    assert "no exponential, no softmax" in told
    assert "of 14 images" in told
    assert "milliseconds, 16x16" in told
    assert sorted(os.listdir(out)) == ["README.md", "model.int8.onnx", "model.onnx", "report.json"]
    assert report["int8"]["batches"] + len(report["int8"]["skipped"]) == 8  # every second of 15
    assert {found["images"] for found in report["accuracy"].values()} == {14}
    assert report["accuracy"]["PyTorch"]["loss"] == pytest.approx(
        report["accuracy"]["ONNX Runtime"]["loss"], rel=1e-5
    )

    # Preprocessing by the metadata, with no more than an image library.
    for name in ("model.onnx", "model.int8.onnx"):
        session = onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
        seen = json.loads(found["preprocessing"])
        assert (json.loads(found["classes"]), seen["interpolation"]) == (CLASSES, "bicubic")
        side = session.get_inputs()[0].shape[-1] if isinstance(session.get_inputs()[0].shape[-1], int) else 16
        whole, image = int(side / seen["crop"]), picture(20, (40, 30))
        image = image.resize((whole, int(whole * 40 / 30)), Image.Resampling.BICUBIC)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        pixels = ((pixels - seen["mean"]) / seen["std"]).astype(np.float32).transpose(2, 0, 1)[None]
        logits = session.run(None, {"image": pixels})[0]
        network = load_network(str(run))
        want = network.model(network.transform()(picture(20, (40, 30)))[None]).detach().numpy()
        assert np.abs(logits - want).max() < (0.02 if name == "model.onnx" else 0.2) * np.abs(want).max()


def test_an_untrained_name_only_if_said_so(tmp_path, capsys):
    out = tmp_path / "graphs"
    assert main(["export", "vit_mini", "--out", str(out), "--img-size", "16", *ONNX]) == 2
    assert "expected a name with weights of timm, got vit_mini" in capsys.readouterr().err
    words = ["--untrained", "--img-size", "16", "--format", "program", "--latency", "0"]
    assert main(["export", "vit_mini", "--out", str(out), *words]) == 0
    assert json.loads((out / "report.json").read_text())["about"]["weights"] == "random"
    assert main(["export", str(out), "--out", str(tmp_path / "other"), "--untrained"]) == 2
    assert "unknown name" in capsys.readouterr().err


def test_a_run_of_characters(tmp_path, capsys):
    words = {"depth": 1, "embed_dim": 12, "num_heads": 2}
    recipe = chars_recipe.Recipe(mechanism="sima", model_args=words, tokens=60)
    folder = write_task(tmp_path / "run", chars, recipe, ["256 bytes"])
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), *ONNX]) == 0
    assert "decoder with sima" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.onnx", "report.json", "start.npz"]
    words = ["--int8", "--calibration", str(folder)]
    assert main(["export", str(folder), "--out", str(tmp_path / "more"), *words]) == 2
    assert "expected a network that classifies images, got a run of another task" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_segmentation_with_a_pyramid(tmp_path):
    words = {"embed_dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
    words |= {"softmax_free": True}
    recipe = segmentation_recipe.Recipe(
        model="soft_tiny", mechanism="sima", model_args=words, decoder_args={"pyramid_channels": 8}
    )
    folder = write_task(tmp_path / "run", segmentation, recipe, ["sky", "road", "tree"])
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), *ONNX]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((2, 3, 64, 64), np.float32)})[0].shape == (2, 3, 64, 64)
    assert report["free"] == ["batch", "height", "width"], report["fixed"]
    assert report["about"]["classes"] == ["sky", "road", "tree"]
    assert report["mechanisms"] == {"SimA": 4}
    assert not report["exponentials"]["ONNX"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--int8"], "int8: expected --int8 and --calibration together, got one alone"),
        (["--calibration", "{empty}"], "int8: expected --int8 and --calibration together"),
        (["--int8", "--calibration", "{empty}"], "expected images (.jpg,"),
        (["--int8", "--calibration", "{empty}/none"], "got nothing at"),
        (["--opset", "9"], "opset: expected 18 to 23, got 9"),
        (["--img-size", "13"], "img_size: expected a size that vit_mini with sima takes, got 13"),
        (["--latency", "-1"], "expected numbers above 0"),
        (["--int8", "--calibration", "{run}", "--format", "program"], "expected images"),
        (["--out", "{run}"], "out: expected a new folder, got"),
    ],
)
def test_what_cannot_be_is_one_sentence(flags, sentence, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(empty=tmp_path / "empty", run=run) for flag in flags]
    before = sorted(os.listdir(tmp_path))
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sentence in err
    assert sorted(os.listdir(tmp_path)) == before


def test_without_its_packages_it_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "export: expected onnxruntime to be installed" in err
    assert "pip install sansmax[onnx]" in err
    assert not (tmp_path / "out").exists()

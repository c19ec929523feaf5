"""The page of `sansmax export --web`: its files, and Chromium that uses it as a person does."""

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import sansmax
from sansmax.cli import main
from sansmax.export import web
from sansmax.export.web import Shown, export_web
from sansmax.maps import attention_map

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLASSES = [f"class {i}" for i in range(7)]
needs_runtime = pytest.mark.skipif(
    not shutil.which("npm"), reason="npm, which fetches onnxruntime-web, is not installed"
)


def shown(mechanism="sima", channels=3, **words):
    torch.manual_seed(0)
    own = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    model = sansmax.create_model("vit_mini", mechanism, in_chans=channels, **own | words).eval()
    for parameter in model.parameters():  # answers that differ
        torch.nn.init.normal_(parameter, std=0.3)
    half, quarter = (0.5,) * channels, (0.25,) * channels
    return Shown(model, f"vit_mini with {mechanism}", CLASSES, 32, 0.875, half, quarter)


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    """Files in place of onnxruntime-web's, for pages that no browser opens."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in web.FILES:
        (folder / name).write_text("")
    monkeypatch.setattr(web, "_runtime_files", lambda: folder)


def ran(file, **feeds):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {key: value.numpy() for key, value in feeds.items()})


@pytest.mark.parametrize("mechanism", ["sima", "xnorm", "softmax", "external", "aft_simple"])
def test_the_graphs_give_the_answer_and_the_map(mechanism, runtime, tmp_path):
    given = shown(mechanism, dynamic_img_size=True)
    about = export_web(given, tmp_path / "page")
    assert json.loads((tmp_path / "page/about.json").read_text()) == json.loads(json.dumps(about))
    told = about["main"]
    assert told["sizes"] == [16, 24, 32, 48, 64, 80, 96, 128]
    assert told["map"] == {"layer": "blocks.1.attn", "patch": 4, "prefix": 1}
    for side in (32, 48):
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        logits, tokens = ran(tmp_path / "page/main.onnx", image=image)
        np.testing.assert_allclose(logits, given.model(image).detach(), rtol=1e-4, atol=1e-4)
        cells = side // 4
        row = torch.zeros(1, cells**2 + 1)
        row[0, 1 + 3 * cells + 2] = 1
        (found,) = ran(tmp_path / "page/main-map.onnx", tokens=torch.tensor(tokens), row=row)
        want = attention_map(given.model, image[0], (3, 2)).flatten()
        np.testing.assert_allclose(found[0, 1:], want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert ("beside" in about) == (mechanism != "softmax")
    assert mechanism == "softmax" or not about["beside"]["trained"]


@pytest.mark.parametrize("mechanism", ["soft", "aft_conv"])
def test_a_page_without_a_map_says_why(mechanism, runtime, tmp_path):
    options = {"mechanism_args": {"landmarks": 4}} if mechanism == "soft" else {}
    told = export_web(shown(mechanism, depth=1, **options), tmp_path / "page")["main"]
    assert told["map"] is None
    assert told["why_no_map"].endswith("cannot be written as a graph")
    assert not (tmp_path / "page/main-map.onnx").exists()


def test_a_network_of_one_size_takes_any_where_it_can(runtime):
    given = shown()
    made = functools.partial(
        sansmax.create_model, "vit_mini", "sima", img_size=32, patch_size=4, embed_dim=24, depth=2,
        num_heads=2, num_classes=7,
    )  # fmt: skip
    free = web.free_size(given.model, made)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(free(image), given.model(image))
    assert free(torch.randn(1, 3, 48, 48)).shape == (1, 7)


def test_the_network_stays_as_it_was(runtime, tmp_path):
    given = shown()
    given.model.double().train()
    export_web(given, tmp_path / "page")
    assert given.model.training
    assert all(p.dtype == torch.float64 and p.requires_grad for p in given.model.parameters())


def test_nothing_is_left_where_it_fails(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"web: expected a new folder, got .*there, which exists"):
        export_web(shown(), tmp_path / "there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ValueError, match=r"web: expected to fetch onnxruntime-web .* with npm, got FileNotFound"
    ):
        export_web(shown(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.glob("cache/sansmax/*"), *tmp_path.glob("cache/sansmax/.*")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "out, web: expected a folder for graphs or one for a page"),
        (["--out", "a", "--web", "b"], "out, web: expected a folder for graphs or one for a page"),
        (["--out", "a", "--beside", "b"], "out, web: expected a folder for graphs or one for a page"),
        (["--web", "b"], "network: expected a run folder or a file at /nowhere/run, got nothing"),
    ],
)
def test_the_command_refuses(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "/nowhere/run", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def served(folder):
    """Its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@needs_runtime
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.skipif(
    not (ROOT / "node_modules/playwright-core").is_dir(),
    reason="playwright-core is not in node_modules (npm install --no-save playwright-core)",
)
def test_in_a_browser(tmp_path):
    given, other = shown(dynamic_img_size=True), shown("softmax", dynamic_img_size=True)
    export_web(given, tmp_path / "page", other)
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    photo.resize((200, 133), Image.Resampling.BICUBIC).save(tmp_path / "flower.png")
    (tmp_path / "none.png").write_text("this is text")
    with served(tmp_path / "page") as address:
        done = subprocess.run(
            ["node", str(HERE / "browser.mjs"), str(CHROMIUM), address, tmp_path / "flower.png",
             tmp_path / "none.png", tmp_path],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert not found["console"]
    assert {url.split("?")[0].startswith((address, "data:", "blob:")) for url in found["requests"]} == {True}
    for moment in ("example", "chosen", "larger"):
        for kind, network in (("main", given), ("beside", other)):
            result = found[moment][kind]
            image = torch.tensor(result["input"]["data"]).view(result["input"]["dims"])
            want = network.model(image)[0]
            torch.testing.assert_close(torch.tensor(result["logits"]), want, rtol=1e-3, atol=1e-3)
            best = want.softmax(0).topk(5)
            assert [one["name"] for one in result["top"]] == [CLASSES[i] for i in best.indices]
            shares = torch.tensor([one["share"] for one in result["top"]])
            torch.testing.assert_close(shares, best.values, rtol=1e-3, atol=1e-4)
    # The pixels are those of the photograph, as PyTorch's own path sees them but for the filter of resizing.
    result = found["chosen"]["main"]["input"]
    side = int(32 / 0.875)
    small = photo.resize((round(200 / 133 * side), side), Image.Resampling.BICUBIC)
    left, top = (small.width - 32) // 2, (side - 32) // 2
    pixels = np.asarray(small.crop((left, top, left + 32, top + 32)), np.float32) / 255
    seen = np.array(result["data"], np.float32).reshape(3, 32, 32).transpose(1, 2, 0) * 0.25 + 0.5
    assert np.abs(seen - pixels).mean() < 0.05
    with torch.no_grad():
        top = given.model((torch.tensor(pixels).permute(2, 0, 1)[None] - 0.5) / 0.25).argmax().item()
    assert found["chosen"]["main"]["top"][0]["name"] == CLASSES[top]
    row, column = found["chosen"]["map"]["query"]
    assert found["moved"]["map"]["query"] == [row - 1, column + 1]
    assert found["pointed"]["map"]["query"] == [0, 0]
    image = torch.tensor(result["data"]).view(1, 3, 32, 32)
    for moment in ("chosen", "moved", "pointed"):
        place = tuple(found[moment]["map"]["query"])
        want = attention_map(given.model, image[0], place).flatten()
        got = torch.tensor(found[moment]["map"]["weights"])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert found["larger"]["size"] == 48
    assert [line.split()[0] for line in found["times"].splitlines()] == ["side", "32", "48"]
    assert found["tabs"] == ["image", "file", "size"]
    assert found["refused"] == "none.png is no image that this browser can read; choose another file"
    assert found["after"]["status"] == found["refused"]
    assert found["phone"][0] <= found["phone"][1] == 390

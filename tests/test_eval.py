"""`sansmax eval`: the figures of a network on labelled images, and which labels are which classes."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from sansmax import cli, models
from sansmax.tasks._data import load_images
from sansmax.train.evaluate import evaluate, label_map, open_labelled
from sansmax.train.network import load_network
from sansmax.train.recipe import Data, Recipe
from test_predict import CLASSES, picture, png, write_run

SYNSETS = ["n01440764", "n02102040", "n03000684"]  # ImageNet's classes 0, 217 and 491


class Pictures:
    """A split of random images; `broken` of them cannot be read."""

    def __init__(self, classes, labels, broken=()):
        self.classes, self.labels, self.broken = classes, labels, broken

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"{i}.png"

    def picture(self, i):
        if i in self.broken:
            raise OSError(f"{i} is broken")
        return picture(i, (23, 31)), self.labels[i]


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return str(tmp_path / "run")


def logits_of(network, split, **words):
    transform = network.transform(**words)
    with torch.no_grad():
        return torch.cat(
            [
                network.model(transform(split.picture(i)[0])[None])
                for i in range(len(split))
                if i not in split.broken
            ]
        )


def test_figures_are_those_of_one_image_after_another(run):
    network = load_network(run)
    split = Pictures(CLASSES, [i % 7 for i in range(29)], broken=(3, 28))
    labels = torch.tensor([label for i, label in enumerate(split.labels) if i not in split.broken])
    for crop in (None, 1.0):
        got = evaluate(network, split, crop=crop, batch_size=8)
        logits = logits_of(network, split, crop=crop)
        top = logits.topk(5).indices == labels[:, None]
        assert got["images"] == 27
        assert got["top1"] == pytest.approx(top[:, 0].float().mean().item())
        assert got["top5"] == pytest.approx(top.any(1).float().mean().item())
        assert got["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        for i, row in enumerate(got["classes"]):
            assert row["name"] == CLASSES[i]
            assert row["images"] == int((labels == i).sum())
            assert row["top1"] == pytest.approx(top[labels == i, 0].float().mean().item())
        assert got["skipped"] == [
            {"path": "3.png", "reason": "3 is broken"},
            {"path": "28.png", "reason": "28 is broken"},
        ]
        assert got["crop"] == (crop or 0.875)
        assert got["images_per_s"] == pytest.approx(27 / got["seconds"])


def test_full_crop_keeps_the_whole_centre_square(run):
    network = load_network(run)
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    white = [(1 - m) / s for m, s in zip(network.mean, network.std, strict=True)]
    seen = network.transform(1.0)(image)[:, :, 1:-1]
    torch.testing.assert_close(seen, torch.tensor(white)[:, None, None].expand_as(seen))
    image.paste("black", (0, 0, 40, 1))
    assert network.transform(1.0)(image)[0, 0].max() < white[0]  # the first row is still in it
    assert network.transform(0.5)(image)[0, 0].min() == pytest.approx(white[0])


def test_bf16_is_close_and_not_the_same(run):
    network, split = load_network(run), Pictures(CLASSES, [0] * 8)
    full, half = (evaluate(network, split, precision=p)["loss"] for p in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_labels_follow_names(run):
    network = load_network(run)
    turned = CLASSES[::-1]
    assert label_map(network, turned) == (CLASSES, [6, 5, 4, 3, 2, 1, 0])
    assert label_map(network, ["fox", "bee"]) == (CLASSES, [5, 1])
    labels = [i % 7 for i in range(14)]
    straight = evaluate(network, Pictures(CLASSES, labels))
    backwards = evaluate(network, Pictures(turned, [6 - label for label in labels]))
    assert straight["loss"] == pytest.approx(backwards["loss"])
    assert [c["images"] for c in backwards["classes"]] == [2] * 7
    with pytest.raises(
        ValueError, match=r"expected the classes of vit_mini \(ant, bee, cat and 4 more\), got hen, owl"
    ):
        label_map(network, ["hen", "bee", "owl"])
    assert label_map(network, None) == (CLASSES, [*range(7)])
    with pytest.raises(ValueError, match="expected labels below 7, got 9"):
        evaluate(network, Pictures(None, [1, 9]))


def test_synsets_are_found_in_a_network_of_timm():
    network = SimpleNamespace(
        model=SimpleNamespace(num_classes=1000), num_classes=1000, name="x", classes=None
    )
    assert label_map(network, SYNSETS)[1] == [0, 217, 491]
    with pytest.raises(ValueError, match=r"expected 1000 classes, as x has, got 2 \(cat, dog\)"):
        label_map(network, ["cat", "dog"])
    assert label_map(network, [str(i) for i in range(1000)])[1] == [*range(1000)]


def test_nothing_readable_is_told(run):
    with pytest.raises(ValueError, match=r"got 2 that cannot \(0.png: 0 is broken\)"):
        evaluate(load_network(run), Pictures(CLASSES, [1, 2], broken=(0, 1)))


def test_a_folder_at_several_sizes(run, tmp_path, capsys):
    for i in range(14):
        folder = tmp_path / "data" / "val" / CLASSES[i % 7]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "eval.json"
    words = ["--data.root", str(tmp_path / "data"), "--data.split", "val", "--data.workers", "0"]
    sizes = ["--img-size", "16", "24", "--crop", "full", "--out", str(out)]
    assert cli.main(["eval", run, *words, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "vit_mini" in printed
    found = json.loads(out.read_text())
    assert [row["img_size"] for row in found["sizes"]] == [16, 24]
    assert found["sizes"][0]["loss"] != found["sizes"][1]["loss"]
    for row in found["sizes"]:
        assert row["images"] == 14
        assert row["crop"] == 1
        assert [entry["path"] for entry in row["skipped"]] == ["val/gnu/broken.png"]
        assert sum(c["images"] * c["top1"] for c in row["classes"]) == pytest.approx(14 * row["top1"])
        assert f"{100 * row['top1']:.2f}" in printed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no files
@pytest.mark.parametrize("named", [True, False])
def test_shards(named, run, tmp_path):
    pytest.importorskip("webdataset")
    root = tmp_path / "shards"
    root.mkdir()
    for k in range(3):
        with tarfile.open(root / f"validation-{k}.tar", "w") as tar:
            for i in range(4):
                for kind, content in (("png", png(4 * k + i)), ("cls", str(i + k).encode())):
                    entry = tarfile.TarInfo(f"{k}{i}.{kind}")
                    entry.size = 9 if (k, i, kind) == (1, 2, "png") else len(content)
                    tar.addfile(entry, io.BytesIO(content))
    if named:
        (root / "_info.json").write_text(json.dumps({"classes": CLASSES[::-1]}))
    network = load_network(run)
    data, split = open_labelled(run, Data(root=str(root), split="validation", workers=0), network)
    assert data.num_classes == 7
    got = evaluate(network, split)
    assert (got["images"], [entry["path"] for entry in got["skipped"]]) == (11, ["validation-1.tar/12"])
    counts = [1, 2, 3, 2, 2, 1, 0]
    assert [c["images"] for c in got["classes"]] == (counts[::-1] if named else counts)
    data, split = open_labelled(run, Data(root=str(root), split="validation", workers=2), network)
    assert evaluate(network, split, workers=2)["loss"] == pytest.approx(got["loss"])


def test_without_a_root_the_run_s_own_held_out_images(tmp_path):
    digits = load_images("digits", 16)
    folder = tmp_path / "run"
    classes = json.dumps(digits.classes)
    words = {
        "img_size": 16,
        "num_classes": 10,
        "in_chans": 1,
        "patch_size": 8,
        "embed_dim": 12,
        "num_heads": 2,
    }
    folder.mkdir()
    model = models.create_model("vit_mini", None, **words).eval()
    own = {key: words[key] for key in ("patch_size", "embed_dim", "num_heads")}
    metadata = {
        "model": "vit_mini",
        "mechanism": "",
        "model_args": json.dumps(own),
        "num_classes": "10",
        "classes": classes,
        "img_size": "16",
        "in_chans": "1",
        "mean": "[0.25]",
        "std": "[0.5]",
        "eval_crop": "1.0",
        "interpolation": "bicubic",
    }
    save_file(model.state_dict(), folder / "weights.safetensors", metadata)
    (folder / "recipe.json").write_text(json.dumps({"recipe": Recipe().to_json()}))
    out = tmp_path / "eval.json"
    assert cli.main(["eval", str(folder), "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["sizes"]
    with torch.no_grad():
        logits = model((digits.val_images.float() / 255 - 0.25) / 0.5)
    assert row["images"] == 445
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, digits.val_labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--img-size", "0"], "expected whole numbers of at least 1"),
        (["--img-size", "20"], "img_size: expected a size that vit_mini takes, got 20 (no multiple"),
        (["--out", "x.txt"], "ends in .json, got x.txt"),
        ([], "data.root: expected labelled images, got none"),
        (["--data.root", "nowhere"], "got nothing at nowhere"),
    ],
)
def test_a_sentence_for_what_cannot_be(flags, sentence, run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", run, *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_weights_of_every_kind(tmp_path):
    """A run with a mechanism, at another size; a converted file; name=checkpoint with another head."""
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trained = write_run(tmp_path / "run", mechanism="aft_full")
    network = load_network(str(tmp_path / "run"))
    assert (network.name, network.classes, network.img_size) == ("vit_mini with aft_full", CLASSES, 16)
    torch.testing.assert_close(network.model(x), trained(x))
    assert load_network(str(tmp_path / "run"), img_size=32).model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert load_network(str(tmp_path / "run" / "best.safetensors")).fingerprint == network.fingerprint
    with pytest.raises(ValueError, match="expected one with 9 classes, got vit_mini with aft_full with 7"):
        load_network(str(tmp_path / "run"), num_classes=9)

    resnet = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save({"state_dict": resnet.state_dict()}, tmp_path / "resnet.pth")
    network = load_network(f"test_resnet={tmp_path}/resnet.pth", img_size=48)
    assert (network.classes, network.num_classes, network.img_size, network.crop) == (None, 5, 48, 0.95)
    torch.testing.assert_close(network.model(x), resnet(x))
    assert network.labels() == ["0", "1", "2", "3", "4"]

    torch.save(timm.create_model("test_vit", num_classes=3, img_size=64).state_dict(), tmp_path / "vit.pth")
    network = load_network(f"test_vit={tmp_path}/vit.pth")
    assert network.img_size == timm.get_pretrained_cfg("test_vit").input_size[1]
    assert load_network(f"test_vit={tmp_path}/vit.pth", img_size=96).img_size == 96

    published, out = tmp_path / "soft.pth", tmp_path / "soft.safetensors"
    torch.save(timm.create_model("sima_nano_12_p16", num_classes=4).state_dict(), published)
    assert cli.main(["convert", str(published), str(out), "--model", "sima_nano_12_p16"]) == 0
    assert load_network(str(out), img_size=64).num_classes == 4


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("pct_cls=x.pth", "expected one that takes images, got pct_cls"),
        ("test_resnet=x.pth", "expected a file at x.pth, got none"),
        ("test_resnt=x.pth", "did you mean 'test_resnet'?"),
        ("test_resnet.nonsense", "unknown name 'nonsense' in weights of test_resnet"),
        ("bad.safetensors", "expected a .safetensors file that can be read at bad.safetensors"),
        (
            "bare.safetensors",
            "metadata name its network, got none in bare.safetensors; give name=bare.safetensors",
        ),
    ],
)
def test_a_sentence_for_weights_that_cannot_be(what, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"cut")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises((ValueError, OSError)) as caught:
        load_network(what)
    assert sentence in str(caught.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="got ConnectionError; go online, or give resnet18=CHECKPOINT"):
        load_network("resnet18")

"""Sub-pixels: order, learning, samples, completions."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sansmax.cli import main
from sansmax.tasks import pixels
from sansmax.tasks._data import Images, load_images
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.sampling import Sampler
from sansmax.tasks._recipes.pixels import Recipe
from sansmax.train.recipe import Data, Optim
from sansmax.train.run import run

CPU = torch.device("cpu")
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def tiny(out="", **changes) -> Recipe:
    optim = Optim(lr=1e-2, lr_batch=None, per="update", warmup=0.0, min_lr=0.0)
    words = {"mechanism": "aft_simple", "model_args": TINY, "epochs": 2, "batch_size": 32, "device": "cpu"}
    words |= {"hflip": 0.0, "level": 0, "data": Data(num_samples=96), "log_every": 1, "optim": optim}
    return Recipe(**words | {"out": str(out)} | changes)


def colours(count=6, side=4, **changes) -> pixels.Pixels:
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=chance, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    made = Images("noise", ["one"], images, labels, images.clone(), labels, "all", True)
    return pixels.Pixels(made, tiny(**changes), CPU)


def test_a_sequence_goes_row_by_row_pixel_by_pixel_channel_by_channel():
    image = torch.arange(2 * 3 * 4).view(1, 3, 2, 4)
    got = pixels.sequence(image)[0].tolist()
    assert got == [int(image[0, c, y, x]) for y in range(2) for x in range(4) for c in range(3)]
    batch = next(iter(colours().val_batches(0, 1, 2)))
    assert batch.inputs[:, 0].tolist() == [256, 256]
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.targets, pixels.sequence(colours().val_images[:2]))


def test_bits_per_dimension_is_the_mean_of_all_sub_pixels():
    task = colours()
    torch.manual_seed(0)
    network = pixels.build(task.recipe, task.classes).eval()
    batches = list(task.val_batches(0, 1, 4))
    got = task.scores(torch.cat([task.verdict(network(b.inputs), b) for b in batches]))
    found = []
    for image in task.val_images:
        values = pixels.sequence(image[None])[0]
        for t in range(len(values)):
            before = torch.cat([torch.tensor([256]), values[:t]])[None]
            found.append(F.cross_entropy(network(before)[:, -1, :256], values[t : t + 1]).item())
    assert got["loss"] == pytest.approx(np.mean(found), rel=1e-5)
    assert got["bits"] == pytest.approx(np.mean(found) / math.log(2), rel=1e-5)


def test_training_images_are_mirrored_and_lightened_by_the_seed_alone():
    task = colours(count=400, hflip=0.5, level=10)
    part = Part(100, seed=1)
    batches = [values for _, values in task.train_batches(0, 0, part)]
    again = [values for _, values in task.train_batches(0, 2, part)]
    assert all(torch.equal(a, b) for a, b in zip(batches[2:], again, strict=True))
    assert not torch.equal(batches[0], next(task.train_batches(1, 0, part))[1])
    plain = {tuple(pixels.sequence(i[None])[0].tolist()): i for i in task.train_images}
    mirrored = {tuple(pixels.sequence(i.flip(-1)[None])[0].tolist()) for i in plain.values()}
    originals = torch.tensor([*plain, *mirrored])
    levels, flips = [], 0
    for row in torch.cat(batches):
        inside = (originals > 10) & (originals < 245)
        apart = torch.where(inside, row - originals, torch.nan)
        low = torch.nan_to_num(apart, nan=99).amin(1)
        high = torch.nan_to_num(apart, nan=-99).amax(1)
        (place,) = (low == high).nonzero()[:, 0].tolist()
        levels.append(int(low[place]))
        flips += place >= len(plain)
        assert torch.equal((originals[place] + levels[-1]).clamp(0, 255), row)
    assert min(levels) == -10
    assert max(levels) == 10
    assert 150 < flips < 250


def test_drawn_images_follow_the_network_and_what_is_given():
    task = colours()
    torch.manual_seed(0)
    network = pixels.build(task.recipe, task.classes).eval()
    drawn = pixels.draw_images(network, task.shape, 3, CPU, sampler=Sampler(temperature=0.0))
    values = pixels.sequence(drawn)
    logits = network(F.pad(values[:, :-1], (1, 0), value=256))
    assert torch.equal(logits[..., :256].argmax(-1), values)
    given = task.val_images[:3, :, :2]
    drawn = pixels.draw_images(network, task.shape, 3, CPU, given=given, seed=1)
    assert torch.equal(drawn[:, :, :2], given)
    assert not torch.equal(drawn[:, :, 2:], task.val_images[:3, :, 2:])
    assert torch.equal(drawn, pixels.draw_images(network, task.shape, 3, CPU, given=given, seed=1))


def test_a_small_run_learns_more_than_every_sub_pixel_by_itself(tmp_path):
    outcome = run(tiny(tmp_path / "run", epochs=6, data=Data(), mechanism="aft_conv", dropout=0.0))
    digits = load_images()
    counts = torch.full((64, 256), 1e-3)  # all values can be: a small count for those never seen
    train, val = (pixels.sequence(i) for i in (digits.train_images, digits.val_images))
    counts.scatter_add_(1, train.T, torch.ones_like(train.T, dtype=torch.float32))
    shares = counts / counts.sum(1, keepdim=True)
    alone = -shares.T[val, torch.arange(64)].log2().mean().item()
    assert outcome.score < 0.95 * alone < 0.5 * 8
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("bits per dimension", "Samples", "Completed halves", "images/s"):
        assert words in page


def test_going_on_repeats_every_weight(tmp_path, monkeypatch):
    whole = run(tiny(tmp_path / "whole", hflip=0.5, level=3, save_every=2))
    loss, calls = pixels.Pixels.loss, []

    def failing(self, outputs, targets):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, outputs, targets)

    monkeypatch.setattr(pixels.Pixels, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "part", hflip=0.5, level=3, save_every=2))
    monkeypatch.undo()
    rest = run(tiny(tmp_path / "part", hflip=0.5, level=3, save_every=2, resume=True))
    assert rest.curve == whole.curve
    for a, b in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_commands(tmp_path, capsys):
    folder = tmp_path / "run"
    run(tiny(folder))
    assert main(["eval", str(folder)]) == 0
    assert "bits per dimension" in capsys.readouterr().out
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 24, 3), 60 * i, np.uint8)).save(images / f"{i}.png")
    (images / "bad.png").write_bytes(b"none")
    assert main(["predict", str(folder), str(images), "--out", str(tmp_path / "bits.csv")]) == 0
    with (tmp_path / "bits.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [bool(row["bits"]) for row in found] == [True, True, True, False]
    assert "cannot identify" in found[3]["error"]
    out = [tmp_path / f"{i}.png" for i in range(3)]
    assert main(["generate", str(folder), "--count", "4", "--out", str(out[0])]) == 0
    assert main(["generate", str(folder), "--count", "4", "--out", str(out[1])]) == 0
    assert out[0].read_bytes() == out[1].read_bytes()
    with Image.open(out[0]) as sheet:
        assert sheet.size == (4 * 10 - 2, 8)
    flags = ["--complete", str(images), "--count", "2", "--out", str(out[2])]
    assert main(["generate", str(folder), *flags]) == 0
    with Image.open(out[2]) as sheet:
        upper = np.asarray(sheet.convert("L"))[:4]
    assert (upper[:, :8] == 0).all()
    assert (upper[:, 10:18] == 60).all()
    capsys.readouterr()
    for bad in (
        ["--count", "0"],
        ["--out", "x.jpg"],
        ["--complete", str(tmp_path / "none")],
        ["--top-k", "0"],
    ):
        assert main(["generate", str(folder), *bad]) == 2
    assert main(["predict", str(folder), str(tmp_path / "none")]) == 2
    assert main(["predict", str(folder), str(images), "--out", "x.txt"]) == 2
    assert capsys.readouterr().err.count("expected") == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": "external"}, "expected one with a causal form"),
        ({"level": -1}, "level: expected a whole number of at least 0"),
        ({"data": Data(root="nowhere"), "img_size": None}, "img_size: expected the side"),
        ({"data": Data(root="nowhere"), "img_size": 8}, "nowhere"),
        ({"model_args": {"depht": 2}}, "model_args: expected words that the decoder takes"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        run(tiny(tmp_path / "x", **changes))


def test_paper_recipes_have_the_papers_numbers_of_parameters():
    from sansmax import recipes

    counts = {}
    for name in ("aft_local", "aft_local_dense", "aft_simple"):
        recipe = recipes.recipe(f"pixels_cifar10_{name}").checked()
        with torch.device("meta"):
            network = pixels.build(recipe, ["3x32x32 sub-pixels"])
        counts[name] = sum(p.numel() for p in network.mixers()[0].parameters())
    assert counts["aft_local"] - counts["aft_simple"] == 2 * 3072 * 64  # table 3: 0.6 M a layer, no head
    assert counts["aft_local_dense"] - counts["aft_simple"] == 3072**2  # 9.6 M

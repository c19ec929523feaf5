"""Segmentation: loss, mIoU, windows, runs, masks."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from sklearn.linear_model import LogisticRegression
from street_scenes import RUN, data_of, mask, picture, streets, striped
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sansmax import cli, recipes
from sansmax.tasks import segmentation
from sansmax.tasks._data.crops import Masked
from sansmax.tasks._data.masks import IGNORED, open_scenes
from sansmax.tasks._recipes.segmentation import Recipe
from sansmax.tasks._windows import Look, normalised
from small_task import interrupted


@pytest.fixture
def folder(tmp_path):
    return streets(tmp_path)


# Loss and figures.


def test_the_loss_is_the_published_mean_over_all_pixels(golden, error):
    case = golden("external_attention/eanet_loss")
    given = case.inputs()
    (targets,) = (v for k, v in given.items() if "logits" not in k)
    task = object.__new__(segmentation.Segmentation)
    task.recipe = replace(RUN, loss="pixels")
    want = next(iter(case.outputs.values())).mean()
    assert error(task.loss(given["logits"], targets.long()), want) < 1e-6


def test_losses():
    task = object.__new__(segmentation.Segmentation)
    logits, targets = torch.randn(2, 5, 7, 3), torch.randint(5, (2, 7, 3))
    targets[0, :3] = IGNORED
    nats = -logits.log_softmax(1).gather(1, targets.clamp(max=4)[:, None])[:, 0]
    kept = targets != IGNORED
    task.recipe = replace(RUN, loss="pixels")
    torch.testing.assert_close(task.loss(logits, targets), (nats * kept).mean())
    task.recipe = replace(RUN, loss="labelled")
    torch.testing.assert_close(task.loss(logits, targets), nats[kept].mean())
    assert task.loss(logits, torch.full_like(targets, IGNORED)) == 0


class Fixed(nn.Module):
    """Logits that are the pixels' own, whatever the image's size."""

    def __init__(self, classes=7):
        super().__init__()
        self.mix = nn.Conv2d(3, classes, 3, padding=1)

    def forward(self, x):
        return self.mix(x)


def task_of(count, **words):
    task = object.__new__(segmentation.Segmentation)
    task.classes, task.recipe = [f"c{i}" for i in range(count)], replace(RUN, **words)
    return task


def test_figures_are_torchmetrics():
    torch.manual_seed(0)
    task, network = task_of(7), Fixed()
    miou = MulticlassJaccardIndex(7, ignore_index=IGNORED)
    each = MulticlassJaccardIndex(7, average="none", ignore_index=IGNORED)
    accuracy = MulticlassAccuracy(7, average="micro", ignore_index=IGNORED)
    verdicts, nats, pixels = [], 0.0, 0
    for i, size in enumerate(((13, 17), (9, 21))):
        targets = torch.randint(5, (2, *size))  # classes 5 and 6 are never true
        targets[:, :4] = IGNORED
        batch = Masked(
            torch.randint(256, (2, 3, *size), dtype=torch.uint8), targets, torch.tensor([2 * i, 2 * i + 1])
        )
        with torch.no_grad():
            network.mix.bias[5] = -1e4  # and class 5 never found
            outputs = task.outputs(network, batch)
            logits = network(normalised(batch.inputs))
        verdicts.append(task.verdict(outputs, batch))
        for metric in (miou, each, accuracy):
            metric.update(logits.argmax(1), targets)
        nats += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        pixels += (targets != IGNORED).sum().item()
    verdicts = torch.cat(verdicts)
    assert verdicts.shape == (4, 2 + 3 * 7)
    found = task.scores(verdicts)
    assert found["miou"] == pytest.approx(miou.compute().item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy.compute().item(), rel=1e-6)
    assert found["loss"] == pytest.approx(nats / pixels, rel=1e-6)
    details = task.details(verdicts)
    assert details["iou"]["c5"] is None
    assert details["iou"]["c6"] == 0
    want = each.compute().tolist()
    assert [v for k, v in details["iou"].items() if k != "c5"] == pytest.approx(want[:5] + want[6:])
    assert sum(details["pixels"].values()) == pixels


# Windows, scales, mirror images.


def test_a_window_that_covers_the_image_changes_nothing():
    network, image = Fixed(), torch.randint(256, (1, 3, 19, 23), dtype=torch.uint8)
    whole = Look().logits(network, image)
    for window in (23, 40):
        ((top, found),) = Look(window=window).bands(network, image)
        assert top == 0
        assert torch.equal(found, whole)


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 8), (10, None), (7, 5)])
def test_windows_are_averaged_where_they_overlap(window, stride):
    network, image = Fixed(), torch.randint(256, (2, 3, 21, 17), dtype=torch.uint8)
    step = stride or -(-2 * window // 3)
    total, count = torch.zeros(2, 7, 21, 17), torch.zeros(21, 17)
    for top in {*range(0, 21 - window, step), 21 - window}:
        for left in {*range(0, 17 - window, step), 17 - window}:
            where = slice(top, top + window), slice(left, left + window)
            total[:, :, *where] += network(normalised(image[:, :, *where]))
            count[where] += 1
    assert (count > 0).all()
    parts = list(Look(window=window, stride=stride).bands(network, image))
    assert len(parts) > 1
    assert [top for top, _ in parts] == [0, *np.cumsum([y.shape[2] for _, y in parts]).tolist()[:-1]]
    torch.testing.assert_close(torch.cat([y for _, y in parts], 2), total / count)


def test_windows_bound_what_is_held():
    """Of a tall image, no tensor in the loop has more rows than a window."""
    seen = []

    class Watched(Fixed):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    image = torch.zeros(1, 3, 400, 30, dtype=torch.uint8)
    rows = [y.shape[2] for _, y in Look(window=20).bands(Watched(), image)]
    assert set(seen) == {(20, 20)}
    assert sum(rows) == 400
    assert max(rows) <= 20


def test_scales_and_mirror_images_as_published():
    """The published test: sizes rounded down, padded to 1 modulo 8, cut, resized corner on corner, summed."""
    network, image = Fixed(), torch.randint(256, (1, 3, 21, 30), dtype=torch.uint8)
    scales, sizes = (0.5, 1.25), []
    network.mix.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
    total = 0
    for mirrored in (False, True):
        for scale in scales:
            x = normalised(image.flip(3) if mirrored else image)
            height, width = int(scale * 21), int(scale * 30)
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=True)
            x = F.pad(x, (0, (9 - width % 8) % 8, 0, (9 - height % 8) % 8))
            y = F.interpolate(network(x)[..., :height, :width], (21, 30), mode="bilinear", align_corners=True)
            total = total + (y.flip(3) if mirrored else y)
    assert sizes == [(17, 17), (33, 41)] * 2
    found = Look(scales, True, output_stride=8).logits(network, image)
    assert sizes == [(17, 17), (33, 41)] * 4
    torch.testing.assert_close(4 * found, total)


# Runs.


@pytest.fixture
def trained(folder, tmp_path):
    """The folder of a finished run of two epochs."""
    from sansmax.train.run import run

    recipe = replace(RUN, data=data_of(folder, ignore=11), out=str(tmp_path / "run"))
    run(recipe)
    return tmp_path / "run"


def test_a_run_its_report_its_figures_and_its_masks(trained, folder, tmp_path, capsys):
    pictures = json.loads((trained / "pictures.json").read_text())
    assert [p["title"] for p in pictures] == ["IoU of every class", "Image, truth, prediction"]
    assert "Image, truth, prediction" in (trained / "report.html").read_text()
    out = tmp_path / "figures.json"
    assert cli.main(["eval", str(trained), "--out", str(out), "--device", "cpu"]) == 0
    told = json.loads(out.read_text())
    best = json.loads((trained / "recipe.json").read_text())["best"]
    assert told["figures"]["miou"] == pytest.approx(best)
    assert set(told["details"]["iou"]) == {"0", "1", "2"}
    assert "mIoU" in capsys.readouterr().out
    flags = ["--scales", "0.5", "1", "--eval-flip", "--window", "20"]
    assert cli.main(["eval", str(trained), *flags, "--device", "cpu"]) == 0

    masks, images = tmp_path / "masks", folder / "val"
    picture(images / "more" / "0.png", 60, 41)
    picture(images / "more" / "0.jpg", 60, 41)
    (images / "bad.jpg").write_bytes(b"no image")
    command = ["predict", str(trained), str(images), "--out", str(masks), "--device", "cpu"]
    assert cli.main(command) == 0
    assert "5 masks, 0 of them from before, 1 unreadable" in capsys.readouterr().out
    assert json.loads((masks / "skipped.json").read_text())[0]["reason"] == "cannot identify image file"
    found = sorted(p.relative_to(masks).as_posix() for p in masks.rglob("*.png"))
    assert found == ["0.png", "1.png", "2.png", "more/0.png", "more/0.png.png"]
    with Image.open(masks / "more" / "0.png") as image:
        assert (image.mode, image.size) == ("P", (41, 60))
        assert np.asarray(image).max() < 3
        assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert (masks / "classes.txt").read_text().split() == ["0", "1", "2"]
    before = {p: p.stat().st_mtime_ns for p in masks.rglob("*.png")}
    (masks / "1.png").unlink()
    assert cli.main(command) == 0
    assert "5 masks, 4 of them from before" in capsys.readouterr().out
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == {masks / "1.png"}
    assert cli.main([*command, "--window", "24"]) == 0  # looked at in another way: all anew
    assert "5 masks, 0 of them from before" in capsys.readouterr().out
    # What nobody of ours has written is not touched.
    mask(masks / "1.png", striped(37, 50, [0, 1]))
    assert cli.main(command) == 2
    assert "expected no other files than masks of sansmax" in capsys.readouterr().err
    assert cli.main([*command[:2], str(images / "bad.jpg"), "--out", str(tmp_path / "m")]) == 2
    assert "expected an image that can be read" in capsys.readouterr().err


def test_a_run_goes_on_exactly(folder, tmp_path):
    from sansmax.train.run import run

    recipe = replace(RUN, data=data_of(folder, ignore=11), batch_size=2, epochs=3, log_every=1, save_every=1)
    whole = run(replace(recipe, out=str(tmp_path / "whole")))
    with interrupted(segmentation, 1, 2):
        run(replace(recipe, out=str(tmp_path / "cut")))
    rest = run(replace(recipe, out=str(tmp_path / "cut"), resume=True))
    assert rest.curve == whole.curve
    assert torch.equal(rest.verdicts, whole.verdicts)


def test_the_commands_of_the_page_and_of_the_recipes_are_understood():
    texts = [(Path(__file__).parents[2] / "docs" / "segmentation.md").read_text(encoding="utf-8")]
    texts += [recipes.describe(name) for name in ("eanet_voc_resnet50", "camvid_sima", "segmentation_sima")]
    lines = [
        line.strip()
        for text in texts
        for line in text.splitlines()
        if line.strip().startswith("sansmax train ")
    ]
    assert len(lines) >= 6
    for line in lines:
        _, _, name, *flags = shlex.split(line, comments=True)
        tyro.cli(Recipe, default=recipes.recipe(name), args=flags).checked()


def colour_baseline(train, val):
    """mIoU of logistic regression on the colour of a pixel."""

    def some(scenes, count):
        picked = [scenes.read(i) for i in range(count)]
        return np.concatenate([p.reshape(-1, 3) for p, _ in picked]) / 255, np.concatenate(
            [m.ravel() for _, m in picked]
        )

    x, y = some(train, 30)
    u, v = some(val, 60)
    found = LogisticRegression(max_iter=200).fit(x[::4], y[::4]).predict(u)
    metric = MulticlassJaccardIndex(len(train.classes))
    return metric(torch.from_numpy(found).long(), torch.from_numpy(v).long()).item()


@pytest.mark.slow
def test_digits_are_learned_beyond_their_colour(tmp_path):
    """Two epochs of part of the small recipe; all of it reaches far more (docs/segmentation.md)."""
    from sansmax.train.run import run

    recipe = recipes.recipe("segmentation_sima")
    data = replace(recipe.data, val_samples=60)
    out = run(replace(recipe, data=data, epochs=2, device="cpu", out=str(tmp_path / "run")))
    baseline = colour_baseline(*open_scenes(data))
    assert baseline < 0.12
    assert out.score > 1.8 * baseline

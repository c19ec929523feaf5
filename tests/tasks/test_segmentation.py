"""Segmentation: data as published, loss, mIoU, windows, EANet's recipe, runs, masks."""

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
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sansmax import cli, layers, recipes
from sansmax.models._dense import Dense
from sansmax.models._eanet import EANet
from sansmax.tasks import segmentation
from sansmax.tasks._data.crops import Masked, crop
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.masks import IGNORED, open_scenes, values_of
from sansmax.tasks._mask_pictures import palette
from sansmax.tasks._recipes.segmentation import MaskData, Recipe
from sansmax.tasks._windows import Look, normalised
from sansmax.train import optim
from sansmax.train.recipe import Optim

CPU = torch.device("cpu")
SMALL = {
    "embed_dims": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "softmax_free": True,
}
FPN = {"pyramid_channels": 8, "segmentation_channels": 32, "dropout": 0.0}
RUN = Recipe(
    mechanism="sima",
    model_args=SMALL,
    decoder_args=FPN,
    crop_size=(32, 32),
    epochs=2,
    batch_size=4,
    device="cpu",
    optim=Optim(lr=1e-2, lr_batch=None, per="update", warmup=0, min_lr=0.0),
)


def picture(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, values, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putpalette(palette().tobytes())
    image.save(path)


def striped(height, width, values):
    """A mask with as many columns of each value."""
    return np.broadcast_to(np.asarray(values)[np.arange(width) * len(values) // width], (height, width))


@pytest.fixture
def folder(tmp_path):
    """As CamVid in the SegNet tutorial: <split> and <split>annot; values 0 to 2, and 11 for none."""
    root = tmp_path / "streets"
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            picture(root / split / f"{i}.png", 37, 50, seed=i)
            mask(root / f"{split}annot" / f"{i}.png", striped(37, 50, [0, 1, 2, 11]), "L")
    return root


def data_of(root, **words):
    return MaskData(root=str(root), workers=0, **words)


def classes_in(scenes, index=0):
    return sorted(np.unique(scenes.read(index)[1]).tolist())


def names(scenes):
    return [scenes.name(i) for i in range(len(scenes))]


# Data.


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2007_000039", "2011_003271"):
        picture(root / "JPEGImages" / f"{name}.jpg", 20, 30)
    mask(root / "SegmentationClass" / "2007_000032.png", striped(20, 30, [0, 1, 15, 255]))
    mask(root / "SegmentationClass" / "2007_000039.png", striped(20, 30, [0, 20]))
    mask(root / "SegmentationClassAug" / "2007_000032.png", striped(20, 30, [0, 2]), "L")
    mask(root / "SegmentationClassAug" / "2011_003271.png", striped(20, 30, [0, 7]), "L")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000039\n")
    (lists / "trainaug.txt").write_text("2007_000032\n2011_003271\n")
    for given in (root, root.parent, tmp_path):
        train, val = open_scenes(data_of(given))
        assert (len(train.classes), train.classes[0], train.classes[20]) == (21, "background", "tvmonitor")
        assert classes_in(train) == [0, 1, 15, IGNORED]
        assert classes_in(val) == [0, 20]
    train, _ = open_scenes(data_of(root, split="trainaug"))
    assert [classes_in(train, i) for i in (0, 1)] == [[0, 2], [0, 7]]  # the masks of SBD
    line = "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png"
    (lists / "trainaug.txt").write_text(f"{line}\n")  # as EMANet's and others' lists
    train, _ = open_scenes(data_of(root, split="trainaug"))
    assert classes_in(train) == [0, 2]
    with pytest.raises(
        FileNotFoundError, match=r"expected a list at .*trainall\.txt, got none; there are train"
    ):
        open_scenes(data_of(root, split="trainall"))


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / "images" / split / f"{name}.jpg", 20, 30)
        mask(root / "annotations" / split / f"{name}.png", striped(20, 30, [0, 1, 150]), "L")
    train, val = open_scenes(data_of(tmp_path))
    assert (len(train.classes), train.classes[0]) == (150, "1")
    for scenes in (train, val):
        assert classes_in(scenes) == [0, 149, IGNORED]  # 0 is "other"
    rows = [f"{i}\t0.1\t1\t1\tname {i}, other name" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert open_scenes(data_of(root))[0].classes[149] == "name 150"


def test_folders_of_images_and_masks(tmp_path, folder):
    train, val = open_scenes(data_of(folder, ignore=11))
    assert (len(train), len(val), train.classes) == (6, 3, ["0", "1", "2"])
    assert classes_in(train) == [0, 1, 2, IGNORED]
    moved = tmp_path / "moved"
    for split in ("train", "val"):
        (moved / "images").mkdir(parents=True, exist_ok=True)
        (moved / "masks").mkdir(exist_ok=True)
        (folder / split).rename(moved / "images" / split)
        (folder / f"{split}annot").rename(moved / "masks" / split)
    assert [len(s) for s in open_scenes(data_of(moved, ignore=11))] == [6, 3]
    nested = tmp_path / "nested"
    for split, other in (("train", "training"), ("val", "valid")):
        (nested / other).mkdir(parents=True)
        (moved / "images" / split).rename(nested / other / "images")
        (moved / "masks" / split).rename(nested / other / "labels")
    assert [len(s) for s in open_scenes(data_of(nested, ignore=11))] == [6, 3]
    (nested / "training").rename(tmp_path / "alone")  # images and masks without splits: a fifth is held out
    train, val = open_scenes(data_of(tmp_path / "alone", ignore=11))
    assert (len(train), len(val)) == (5, 1)
    assert not set(names(train)) & set(names(val))
    with pytest.raises(FileNotFoundError, match=r"expected images and masks of the split 'test'.*got "):
        open_scenes(data_of(nested, val_split="test"))


def test_classes_of_a_folder(folder):
    given = data_of(folder, ignore=11, classes=("sky", "road", "tree", "car"))
    assert open_scenes(given)[0].classes == ["sky", "road", "tree", "car"]
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert open_scenes(data_of(folder, ignore=11))[0].classes == ["a", "b", "c"]
    train, _ = open_scenes(data_of(folder, ignore=1, classes=("sky", "void", "tree")))
    assert train.classes == ["sky", "tree"]  # the ignored value has no class
    (folder / "classes.txt").unlink()
    for path in folder.glob("*annot/*"):
        mask(path, striped(37, 50, [0, 255]), "L")
    with pytest.raises(
        ValueError, match=r"expected 2 to 254 classes, got 1 \(0\) from the masks of .*data.ignore"
    ):
        open_scenes(data_of(folder))
    train, _ = open_scenes(data_of(folder, ignore=-1))
    assert (train.classes, classes_in(train)) == (["0", "255"], [0, 1])


def test_bad_items_are_left_out_and_listed(folder):
    mask(folder / "trainannot" / "0.png", striped(30, 50, [0, 1]), "L")
    mask(folder / "trainannot" / "1.png", striped(37, 50, [0, 77]), "L")
    (folder / "trainannot" / "2.png").unlink()
    (folder / "train" / "3.png").write_bytes(b"no image")
    Image.new("RGB", (50, 37)).save(folder / "trainannot" / "4.png")
    (folder / "valannot" / "2.png").unlink()
    mask(folder / "valannot" / "9.png", striped(37, 50, [0, 1]), "L")
    recipe = replace(RUN, data=data_of(folder, ignore=11, classes=("a", "b", "c")))
    task = segmentation.open_task(recipe, CPU)
    # Training goes on with those that can be read, and every batch is full.
    shapes = [x.shape for x, _ in task.train_batches(0, 0, Part(2))]
    assert shapes == [(2, 3, 32, 32)] * 3
    assert sum(len(batch) for batch in task.val_batches(0, 1, 2)) == 2
    found = {entry["path"]: entry["reason"] for entry in task.skipped}
    assert found == {
        "train/0.png": "mask of 50x30 pixels, image of 50x37",
        "train/1.png": "value 77 in its mask is no class",
        "train/2.png": "no mask of that name",
        "train/3.png": "cannot identify image file",
        "train/4.png": "its mask: expected one channel of class numbers, got RGB",
        "val/2.png": "no mask of that name",
        "valannot/9.png": "no image of that name",
    }


def test_nothing_but_bad_items_is_one_sentence(folder):
    for path in folder.glob("train/*"):
        path.write_bytes(b"no image")
    task = segmentation.open_task(replace(RUN, data=data_of(folder, ignore=11)), CPU)
    with pytest.raises(ValueError, match=r"expected images that can be read in streets train, got none"):
        next(task.train_batches(0, 0, Part(2)))
    with pytest.raises(NotADirectoryError, match=r"data.root: expected a folder, got nothing at nowhere"):
        open_scenes(data_of("nowhere"))


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_modes_of_masks(tmp_path, mode):
    path, values = tmp_path / "mask.png", np.array([[0, 1, 1], [1, 0, 0]])
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif mode == "1":
        Image.fromarray(values.astype(bool)).save(path)
    else:
        mask(path, values, mode)
    assert np.array_equal(values_of(path), values)


# Views.


def test_a_view_is_the_image_and_its_mask_moved_alike():
    """Every pixel holds its own class as its colour."""
    values = np.random.default_rng(0).integers(0, 9, (11, 13)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    image = np.stack([values * 20] * 3, 2)
    mean, std = normalised(torch.zeros(3, 1, 1, dtype=torch.uint8)), 20 * (1 / 255)
    seen = set()
    for seed in range(60):
        pixels, classes = crop(image, values, (70, 120), (0.5, 2.0), 0.5, seed)
        assert (pixels.shape, classes.shape) == ((3, 70, 120), (70, 120))
        outside = classes == IGNORED
        assert (pixels[:, outside] == 0).all()  # 0 after the normalisation
        seen.add((outside.any(1).all().item(), outside.any(0).all().item()))
        if outside.any():
            row, column = (~outside).any(1).sum(), (~outside).any(0).sum()
            assert outside[row:].all() or row == 70
            assert outside[:, column:].all() or column == 120 or seed  # mirrored ones are padded on the left
        found = ((pixels[0] - mean[0]) / (std / 0.229)).round()
        assert ((found == classes) | outside).float().mean() > 0.6  # bilinear between two squares
    assert len(seen) > 1


def test_views_follow_from_the_seed_alone(folder):
    task = segmentation.open_task(replace(RUN, data=data_of(folder, ignore=11)), CPU)
    whole = list(task.train_batches(1, 0, Part(2, seed=3)))
    rest = list(task.train_batches(1, 1, Part(2, seed=3)))
    assert len(whole) == 3
    for (x, y), (u, v) in zip(whole[1:], rest, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    other = next(task.train_batches(2, 0, Part(2, seed=3)))
    assert not torch.equal(other[0], whole[0][0])
    halves = [next(task.train_batches(1, 0, Part(4, rank=r, world=2, seed=3)))[0] for r in (0, 1)]
    both = next(task.train_batches(1, 0, Part(4, seed=3)))[0]
    assert torch.equal(torch.cat(halves).sum(0), both[[0, 3, 1, 2]].sum(0))


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
    torch.testing.assert_close(4 * found, total)


# Networks.


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_every_mechanism_has_its_recipes(mechanism):
    for family, classes in (("segmentation", 11), ("camvid", 11)):
        recipe = recipes.recipe(f"{family}_{mechanism}").checked()
        assert Recipe.from_json(recipe.to_json()) == recipe
        network = segmentation.build(recipe, [""] * classes).eval()
        found = {type(m) for m in network.modules() if isinstance(m, layers.Mixer)}
        assert len(found) == 1
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert network(x).shape == (1, 11, 64, 64)
        assert network(x[:, :, :50, :37]).shape == (1, 11, 50, 37)


@pytest.mark.parametrize(
    ("model", "decoder", "words", "args"),
    [
        ("sima_tiny_12_p16_pyramid", "fpn", {"embed_dim": 32, "depth": 4, "num_heads": 2}, FPN),
        (
            "xvit_u_p16_pyramid",
            "upernet",
            {"embed_dim": 32, "depth": 4, "num_heads": 2, "attn_dim": 16},
            {"decoder_channels": 8},
        ),
        (
            "vit_tiny_p16_pyramid",
            "upernet",
            {"embed_dim": 32, "depth": 4, "num_heads": 2},
            {"decoder_channels": 8},
        ),
        ("resnet18", "fpn", {}, FPN),
    ],
)
def test_networks_under_decoders(model, decoder, words, args):
    recipe = replace(RUN, model=model, mechanism=None, decoder=decoder, model_args=words, decoder_args=args)
    network = segmentation.build(recipe, ["a", "b", "c"])
    assert isinstance(network, Dense)
    out = network(torch.randn(2, 3, 48, 64))
    assert out.shape == (2, 3, 48, 64)
    out.square().mean().backward()
    assert all(p.grad is not None for p in network.decoder.parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "eanet_resnet50"}, "decoder: expected none with eanet_resnet50"),
        ({"decoder": ""}, "decoder: expected fpn or upernet with soft_tiny"),
        (
            {"model": "sima_tiny_12_p16"},
            "strides 4, 8, 16 and 32, got sima_tiny_12_p16 .*use sima_tiny_12_p16_pyramid",
        ),
        ({"model": "resnet18"}, "mechanism: expected none with resnet18"),
        ({"model": "nosuch", "mechanism": None}, "model: expected a name of timm or sansmax, got 'nosuch'"),
        ({"decoder_args": {"colour": 3}}, "model_args, decoder_args: expected words"),
    ],
)
def test_networks_that_do_not_fit(changes, match):
    changes = {"model_args": {} if "model" in changes else SMALL, **changes}
    with pytest.raises(ValueError, match=match):
        segmentation.build(replace(RUN, **changes), ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rescale": (2.0, 0.5)}, "rescale: expected two rising"),
        ({"stride": 9}, "stride: expected at most the window"),
        ({"window": 4, "stride": 9}, "stride: expected at most the window's side 4"),
        ({"scales": ()}, "scales: expected a number above 0"),
        ({"crop_size": (0, 4)}, "crop_size: expected a whole number"),
        ({"hflip": 2.0}, "hflip: expected a share"),
        ({"loss": "all"}, "loss: expected one of pixels, labelled"),
    ],
)
def test_settings_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(RUN, **changes).checked()


# EANet's recipe.


def eanet(**words):
    small = {
        "depths": [1, 1, 1, 1],
        "stem_width": 8,
        "channels": [8, 12, 16, 20],
        "embed_dim": 32,
        "head_hidden_size": 24,
    }
    recipe = recipes.recipe("eanet_voc_resnet50")
    return replace(recipe, model_args=small, device="cpu", **words)


def test_the_published_groups_and_rates(golden):
    recipe = eanet()
    network = segmentation.build(recipe, [""] * 21)
    assert isinstance(network, EANet)
    optimizer = optim.optimizer(network, recipe)
    assert type(optimizer) is torch.optim.SGD
    convs, norms, biases = optimizer.param_groups
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0, 0.0]
    assert [g["nesterov"] for g in optimizer.param_groups] == [False] * 3
    kinds = {id(p): m for m in network.modules() for p in m.parameters(recurse=False)}
    named = {id(p): name for name, p in network.named_parameters()}
    assert all(isinstance(kinds[id(p)], nn.BatchNorm2d) and p.ndim == 1 for p in norms["params"])
    assert all(named[id(p)].endswith("bias") for p in biases["params"])
    assert {named[id(p)] for p in convs["params"]} >= {
        "neck.3.attn.memory_k",
        "neck.3.attn.memory_v",
        "fc.weight",
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)
    schedule = optim.schedule(optimizer, recipe, 661)
    total = 68 * 661
    for update in (0, 10, 22_470, 44_940):
        schedule.step(update)
        want = 9e-3 * (1 - update / total) ** 0.9
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == pytest.approx([want, want, 2 * want], rel=1e-6)
    with pytest.raises(ValueError, match="layer_decay: expected none with eanet_resnet50"):
        optim.optimizer(network, replace(recipe, optim=replace(recipe.optim, layer_decay=0.9)))


def test_the_rate_stands_still_for_ten_updates(folder, tmp_path):
    recipe = eanet(
        data=data_of(folder, ignore=11),
        crop_size=(33, 33),
        epochs=12,
        batch_size=3,
        log_every=1,
        out=str(tmp_path / "run"),
    )
    from sansmax.train.run import run

    run(replace(recipe, optim=replace(recipe.optim, hold=10)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    want = [9e-3 * (1 - (i - i % 10) / 24) ** 0.9 for i in range(24)]
    assert rates == pytest.approx(want, rel=1e-5)


def test_weights_of_the_backbone(tmp_path):
    recipe = eanet(weights=str(tmp_path / "resnet.pth"))
    donor = segmentation.build(recipe, ["a", "b"])
    with torch.no_grad():
        for p in donor.parameters():
            p.normal_()
    state = {k: v for k, v in donor.backbone.state_dict().items() if "num_batches" not in k}
    torch.save(state | {"fc.weight": torch.zeros(1000, 80), "fc.bias": torch.zeros(1000)}, recipe.weights)
    network = segmentation.build(recipe, ["a", "b", "c"])
    segmentation.load_weights(network, recipe)
    assert torch.equal(network.backbone.layer4[0].conv2.weight, donor.backbone.layer4[0].conv2.weight)
    torch.save(donor.state_dict(), recipe.weights)
    segmentation.load_weights(network, recipe)
    assert torch.equal(network.neck[0].weight, donor.neck[0].weight)
    assert network.fc.out_channels == 3
    torch.save({"x": torch.zeros(2)}, recipe.weights)
    with pytest.raises(ValueError, match="missing"):
        segmentation.load_weights(network, recipe)


def test_weights_of_a_classifier(tmp_path):
    from sansmax import create_model

    donor = create_model("soft_tiny", "sima", num_classes=4, img_size=32, **SMALL)
    torch.save(donor.state_dict(), tmp_path / "classifier.pt")
    recipe = replace(RUN, weights=str(tmp_path / "classifier.pt"))
    network = segmentation.build(recipe, ["a", "b"])
    segmentation.load_weights(network, recipe)
    own = {k.removeprefix("model."): v for k, v in network.encoder.state_dict().items()}
    assert all(torch.equal(v, donor.state_dict()[k]) for k, v in own.items())


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
    from sansmax.train.guard import Interrupted
    from sansmax.train.run import run

    recipe = replace(RUN, data=data_of(folder, ignore=11), batch_size=2, epochs=3, log_every=1, save_every=1)
    whole = run(replace(recipe, out=str(tmp_path / "whole")))
    opened = segmentation.open_task

    def stopped(*given):
        task = opened(*given)
        original = task.train_batches

        def batches(epoch, update, part):
            for number, batch in enumerate(original(epoch, update, part), update):
                if (epoch, number) == (1, 2):
                    raise KeyboardInterrupt
                yield batch

        task.train_batches = batches
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "open_task", stopped)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
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
    assert out.score > 1.5 * baseline

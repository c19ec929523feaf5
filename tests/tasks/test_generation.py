"""A generator and its discriminator: turns, loss, figures, learning, exact resume, commands."""

import csv
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from scipy.linalg import sqrtm

from sansmax import layers, recipes
from sansmax.cli import main
from sansmax.tasks import _drawn, _features, generation
from sansmax.tasks._data import load_images
from sansmax.tasks._data.draws import Part
from sansmax.tasks._recipes.generation import Recipe
from sansmax.train import loop
from sansmax.train.recipe import Data, Optim
from sansmax.train.run import run
from sansmax.train.verdicts import evaluate

CPU = torch.device("cpu")
SIZES = {"widths": [12, 8], "discriminator_widths": [8, 12], "halvings": 1, "attention_after": 1}


@pytest.fixture
def quick(monkeypatch):
    """A classifier that has hardly learned, which most tests do not ask for more."""
    monkeypatch.setattr(_features, "EPOCHS", 1)


def tiny(out="", optim=None, **changes) -> Recipe:
    words = {"opt": "adam", "lr": 2e-3, "lr_batch": None, "weight_decay": 0.0, "betas": (0.0, 0.99)}
    words |= {"per": "update", "warmup": 0.0, "min_lr": 2e-3}
    given = {"mechanism": "sima", "model_args": SIZES, "latent_dim": 7, "d_steps": 2, "epochs": 2}
    given |= {"batch_size": 32, "device": "cpu", "data": Data(num_samples=224), "log_every": 1}
    return Recipe(optim=Optim(**words | (optim or {})), **given | {"out": str(out)} | changes)


def opened(**changes) -> generation.Generation:
    return generation.open_task(tiny(**changes), CPU)


def network(task) -> torch.nn.Module:
    torch.manual_seed(0)
    return generation.build(task.recipe, task.classes)


def test_turns_follow_from_the_number_of_the_update(quick):
    task, part = opened(hflip=0.5), Part(32, seed=3)
    epochs = [list(task.train_batches(epoch, 0, part)) for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [7, 7, 7]
    mine = [targets is None for epoch in epochs for _, targets in epoch]
    assert mine == [i % 3 == 2 for i in range(21)]
    for (a, _), (b, _) in zip(epochs[1][4:], task.train_batches(1, 4, part), strict=True):
        assert all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(epochs[0][0][0].noise, epochs[1][0][0].noise)
    turn, signs = epochs[0][0]
    assert signs.tolist() == [1] * 32 + [-1] * 32
    images = task.images.train_images
    for image, label in zip(turn.images, turn.labels, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8)
        places = ((images == pixels) | (images == pixels.flip(-1))).flatten(1).all(1).nonzero()
        flipped = (images == pixels.flip(-1)).flatten(1).all(1)
        plain = (images == pixels).flatten(1).all(1)
        assert label in task.images.train_labels[plain | flipped]
        assert len(places) or flipped.any()


def test_pieces_and_processes_share_out_the_same_noise(quick):
    task = opened()
    whole = list(task.train_batches(0, 0, Part(32)))
    for pieces, world in ((2, 1), (1, 2)):
        parts = [list(task.train_batches(0, 0, Part(32, pieces, rank, world))) for rank in range(world)]
        flat = [turn for part in parts for turn, _ in part[: pieces if world == 1 else 1]]
        got = torch.cat([turn.noise for turn in flat])
        assert torch.equal(got.sum(1).sort().values, whole[0][0].noise.sum(1).sort().values)


def test_the_loss_is_the_hinge(quick):
    task = opened()
    scores = torch.tensor([0.5, 2.0, -0.25, -3.0])
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert task.loss(scores, signs).item() == pytest.approx((0.5 + 0.0) / 2 + (0.75 + 0.0) / 2)
    assert task.loss(scores, None).item() == pytest.approx(-(0.5 + 2.0 - 0.25 - 3.0) / 4)


def verdicts_of(task, real, fake, logits, labels):
    chance = torch.Generator().manual_seed(5)
    scores = torch.randn(len(labels), 3, generator=chance)
    outputs = torch.cat([scores, real, fake, logits], 1)
    held = generation.Held(None, labels, torch.arange(len(labels)))
    return task.verdict(outputs, held), scores


def test_figures_by_hand(quick):
    task, chance = opened(), torch.Generator().manual_seed(0)
    dim, count = task.features.dim, 90
    real = torch.randn(count, dim, generator=chance)
    fake = 0.5 * torch.randn(count, dim, generator=chance) + 0.3
    logits, labels = torch.randn(count, 10, generator=chance), torch.randint(10, (count,), generator=chance)
    verdicts, scores = verdicts_of(task, real, fake, logits, labels)
    found = task.scores(verdicts)
    assert list(found) == list(task.figures)

    x, y = real.double().numpy(), fake.double().numpy()
    kernel = [(a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    inside = [(k.sum() - np.trace(k)) / (count * (count - 1)) for k in kernel[:2]]
    assert found["kid"] == pytest.approx(sum(inside) - 2 * kernel[2].mean())
    s, t = np.cov(x.T), np.cov(y.T)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert found["frechet"] == pytest.approx(distance, rel=1e-6)
    p = logits.double().softmax(1)
    assert found["class_score"] == pytest.approx((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert found["margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), abs=1e-6)
    means = [[F.pdist(z[labels == k]).mean() for k in labels.unique()] for z in (fake, real)]
    assert found["diversity"] == pytest.approx((sum(means[0]) / sum(means[1])).item(), rel=1e-5)

    collapsed, _ = verdicts_of(task, real, real[:10][labels], logits, labels)  # one image a class
    assert task.scores(collapsed)["diversity"] == 0
    same, _ = verdicts_of(task, real, real, logits, labels)
    assert task.scores(same)["diversity"] == 1
    assert task.scores(same)["frechet"] == pytest.approx(0, abs=1e-6)
    assert generation.spread(real[:1], labels[:1]) != generation.spread(real[:1], labels[:1])  # NaN
    assert "not to be compared with published figures" in task.words(found)


def test_what_is_generated_beside_a_held_out_image_is_its_own(quick):
    task = opened()
    gan = network(task)
    first, second = (evaluate(gan, task, Accelerator(cpu=True), size) for size in (64, 23))
    assert first.shape == (task.val_size, 5 + 2 * task.features.dim + 10)
    assert torch.allclose(first, second, atol=1e-4)
    assert torch.equal(first[:, 1].long(), task.images.val_labels)
    halves = [torch.cat([b.inputs.noise for b in task.val_batches(rank, 2, 50)]) for rank in range(2)]
    whole = torch.cat([b.inputs.noise for b in task.val_batches(0, 1, 64)])
    assert torch.equal(whole[0::2], halves[0])
    assert torch.equal(whole[1::2], halves[1])


def test_the_classifier_follows_from_the_seed_alone_and_learns():
    images = load_images()
    before = torch.get_rng_state()
    one, two = (_features.OwnClassifier(images, 4, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    found = [judge(images.val_images) for judge in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape == (445, one.dim)
    assert (found[0][1].argmax(1) == images.val_labels).float().mean() > 0.95


def whole(folder, **changes):
    """Its curve, and the network that was evaluated."""
    words = {"save_every": 2, "d_lr_scale": 2.0, "hflip": 0.5, "optim": {"ema": 0.8}}
    return run(tiny(folder, **words | changes))


@pytest.mark.parametrize("stop", [2, 9])  # before the generator has had any turn, and in the second epoch
def test_going_on_repeats_every_weight(tmp_path, monkeypatch, quick, stop):
    first = whole(tmp_path / "whole")
    loss, calls = generation.Generation.loss, []

    def failing(self, outputs, targets):
        calls.append(1)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return loss(self, outputs, targets)

    monkeypatch.setattr(generation.Generation, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "part")
    monkeypatch.setattr(generation.Generation, "loss", loss)
    rest = whole(tmp_path / "part", resume=True)
    assert rest.curve == first.curve
    old, new = (outcome.network.state_dict() for outcome in (first, rest))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_update_that_is_not_finite_leaves_no_trace(tmp_path, monkeypatch, quick):
    loss, calls, kept = generation.Generation.loss, [], []

    def broken(self, outputs, targets):
        calls.append(1)
        return loss(self, outputs, targets) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(generation.Generation, "loss", broken)
    recipe = tiny(epochs=1)
    task = generation.open_task(recipe, CPU)
    gan = network(task)
    agreed = loop.parallel.agreed

    def noted(*arguments):
        kept.append({name: p.clone() for name, p in gan.named_parameters()})
        return agreed(*arguments)

    monkeypatch.setattr(loop.parallel, "agreed", noted)
    outcome = loop.train(gan, task, recipe)
    assert outcome.skipped == 1
    assert all(torch.equal(kept[3][name], kept[4][name]) for name in kept[3])
    assert all(tensor.isfinite().all() for tensor in outcome.network.state_dict().values())


def test_without_classes(tmp_path, capsys, quick):
    outcome = run(tiny(tmp_path / "run", conditional=False, mechanism=None, epochs=1))
    assert "accuracy" not in outcome.curve[0]
    assert outcome.network.discriminator.embed is None
    assert main(["generate", str(tmp_path / "run"), "--count", "3", "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (3 * 10 - 2, 8)
    flags = ["generate", str(tmp_path / "run"), "--classes", "3", "--out", str(tmp_path / "x.png")]
    assert main(flags) == 2
    assert "classes: expected none of a network without" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_features, "EPOCHS", 1)
        run(tiny(folder, precision="bf16", epochs=1))
    return folder


def test_commands(trained, tmp_path, capsys, quick):
    assert main(["eval", str(trained), "--out", str(tmp_path / "figures.json")]) == 0
    assert "not to be compared" in capsys.readouterr().out
    details = json.loads((tmp_path / "figures.json").read_text())["details"]
    assert set(details["accuracy"]) == set("0123456789")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((5, 24), 60 * i, np.uint8)).save(images / f"{i}.png")  # small and grey
    (images / "bad.png").write_bytes(b"none")
    assert main(["predict", str(trained), str(images), "--out", str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [bool(row["score"]) for row in found] == [True, True, True, False]
    assert {row["class"] for row in found[:3]} <= set("0123456789")
    assert "cannot identify" in found[3]["error"]
    out = [tmp_path / f"{i}.png" for i in range(4)]
    base = ["generate", str(trained), "--count", "3", "--classes", "4", "7", "--out"]
    for path, more in zip(out, [[], [], ["--truncation", "0.5"], ["--interpolate", "5"]], strict=True):
        assert main([*base, str(path), *more]) == 0
    pictures = [path.read_bytes() for path in out]
    assert pictures[0] == pictures[1] != pictures[2]
    with Image.open(out[0]) as sheet, Image.open(out[3]) as rows:
        assert sheet.size == (28, 18)
        assert rows.size == (48, 28)
    capsys.readouterr()
    for bad in (
        ["--count", "0"],
        ["--out", "x.jpg"],
        ["--classes", "ten"],
        ["--truncation", "0"],
        ["--interpolate", "1"],
    ):
        assert main(["generate", str(trained), *bad]) == 2
    assert main(["predict", str(trained), str(tmp_path / "none")]) == 2
    assert main(["predict", str(trained), str(images), "--out", "x.txt"]) == 2
    assert capsys.readouterr().err.count("expected") == 7


def test_the_report_draws_every_figure_by_itself(trained):
    page = (trained / "report.html").read_text()
    for title in ("KID (own classifier)", "Fréchet distance (own classifier)", "Margin", "Diversity"):
        assert f"{title} on held-out images" in page
    for words in ("Samples", "Interpolation", "not to be compared with published figures"):
        assert words in page


def test_noise_between_two_and_within_a_bound():
    first, last = torch.randn(2, 6, 500, generator=torch.Generator().manual_seed(0))
    path = _drawn.between(first, last, 7)
    assert torch.allclose(path[:, 0], first, atol=1e-5)
    assert torch.allclose(path[:, -1], last, atol=1e-4)
    lengths = path.norm(dim=2)
    assert lengths.min() > 0.9 * min(first.norm(dim=1).min(), last.norm(dim=1).min())
    bound = _drawn.noises(40, 50, torch.Generator().manual_seed(1), truncation=0.7)
    assert 0.65 < bound.abs().max() <= 0.7
    free = _drawn.noises(40, 50, torch.Generator().manual_seed(1), truncation=9.0)
    assert free.std() == pytest.approx(1, abs=0.05)


def test_a_row_goes_from_one_class_to_the_next(quick):
    task = opened()
    maker = network(task).eval().generator
    drawn = _drawn.samples(maker, 3, [4, 7], seed=2, steps=5).view(3, 5, 1, 8, 8)
    chance = torch.Generator().manual_seed(2)
    first, last = (_drawn.noises(3, 7, chance) for _ in range(2))
    labels = torch.tensor([4, 7, 4])
    with torch.no_grad():
        assert torch.equal(drawn[:, 0], _drawn.as_bytes(maker(first, labels)))
        assert (drawn[:, 4].int() - _drawn.as_bytes(maker(last, 11 - labels)).int()).abs().max() <= 1


def inception_file(path):
    """Random weights of Inception's shapes."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    class Shell(published.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Shell("x", ["2048", "logits_unbiased"], str(path)).state_dict(), path)
    return path


def test_with_inception_fid_and_is_take_their_place(tmp_path, monkeypatch):
    weights = inception_file(tmp_path / _features.FILE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = load_images()
    few = replace(images, val_images=images.val_images[:5], val_labels=images.val_labels[:5])
    task = generation.Generation(few, tiny(inception=str(weights)).checked(), CPU)
    found = task.scores(evaluate(network(task), task, Accelerator(cpu=True), 3))
    assert list(found) == ["fid", "kid", "class_score", "margin", "diversity"]
    assert all(math.isfinite(found[name]) for name in ("fid", "kid", "class_score", "margin"))
    assert "compared" not in task.words(found)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        FileNotFoundError, match=f"inception: expected torch-fidelity's file {_features.FILE}"
    ):
        opened(inception="hub")
    weights.rename(tmp_path / "checkpoints" / _features.FILE)
    assert opened(inception="hub").features.dim == 2048


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(ValueError, match="inception: expected the weights of torch-fidelity's Inception"):
        opened(inception=str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": 24}, "img_size: expected 8, 16, 32, ..., which doubling 4 gives, got 24; use 16"),
        ({"data": Data(root="nowhere")}, "img_size: expected the side of the images"),
        ({"data": Data(root="nowhere"), "img_size": 8}, "nowhere"),
        ({"parallel": "fsdp"}, "parallel: expected ddp"),
        ({"precision": "fp16"}, "precision: expected fp32 or bf16"),
        ({"compile": True}, "compile: expected none"),
        ({"drop_path": 0.1}, "drop_path: expected 0"),
        ({"model": "vit_mini"}, "model: expected gan"),
        ({"d_steps": 0}, "d_steps: expected a whole number of at least 1"),
        ({"d_lr_scale": 0.0}, "d_lr_scale: expected a number above 0"),
        ({"model_args": {"width": 2}}, "model_args: expected words that the networks take"),
        ({"mechanism": "softmx"}, "did you mean 'softmax'"),
        ({"img_size": 16}, "widths: expected as many numbers as 4, 8, 16, ... 16"),
        ({"checkpointing": True}, "checkpointing: expected a network with set_grad_checkpointing"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, tmp_path, quick):
    with pytest.raises((ValueError, OSError), match=words):
        run(tiny(tmp_path / "x", **changes))


def test_recipes():
    for data, size in (("cifar10", 50_000), ("tiny_imagenet", 100_000)):
        for name in (f"eagan_{data}", f"sagan_{data}"):
            recipe = recipes.recipe(name).checked()
            updates = size // recipe.batch_size * recipe.epochs
            assert 100_000 <= sum(map(recipe.turn, range(updates))) < 100_300
    for family in ("generation", "cifar10_gan"):
        for mechanism in layers.mechanisms():
            recipe = recipes.recipe(f"{family}_{mechanism}").checked()
            with torch.device("meta"):
                generation.build(recipe, list("0123456789"))


@pytest.mark.slow
def test_a_short_run_beats_a_gaussian_of_every_pixel(tmp_path):
    """Every pixel of a class has its mean and deviation."""
    recipe = replace(recipes.recipe("generation_external"), epochs=11, out=str(tmp_path), device="cpu")
    task = generation.open_task(recipe, CPU)
    gan = network(task)
    before = task.scores(evaluate(gan, task, Accelerator(cpu=True)))
    after = loop.train(gan, task, recipe)
    found = task.scores(after.verdicts)
    pixels, labels = task.images.train_images.float(), task.images.train_labels
    moments = [(pixels[labels == k].mean(0), pixels[labels == k].std(0)) for k in range(10)]
    mean, deviation = (torch.stack(x)[task.images.val_labels] for x in zip(*moments, strict=True))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = (mean + deviation * noise).round().clamp(0, 255).to(torch.uint8)
    features, logits = task.features(drawn)
    verdicts = after.verdicts.clone()
    dim = task.features.dim
    verdicts[:, 5 + dim :] = torch.cat([features, logits], 1).double()
    baseline = task.scores(verdicts)
    print(before, baseline, found)
    assert found["kid"] < 0.7 * baseline["kid"] < 0.1 * before["kid"]
    assert found["accuracy"] > 0.6 > 3 * before["accuracy"]
    assert 0.5 < found["diversity"] < 1.3

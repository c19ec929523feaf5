"""Point clouds: what the network sees, figures, layouts, learning, going on, predictions."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sansmax import layers, recipes
from sansmax.cli import main
from sansmax.tasks import points
from sansmax.tasks._data import solids
from sansmax.tasks._data.draws import Part, generator
from sansmax.tasks._data.point_views import View, changed, view
from sansmax.tasks._data.points import in_ball, open_clouds
from sansmax.tasks._data.points_files import read_cloud
from sansmax.tasks._recipes.points import PointAugment, PointData, Recipe
from sansmax.train import run as runs
from sansmax.train.recipe import Optim
from sansmax.train.run import run

CPU = torch.device("cpu")
PLAIN = PointAugment(dropout=0.0, scale=(1.0, 1.0), translate=0.0)
TINY = {"embed_dim": 16, "depth": 1, "num_features": 16, "head_dims": (12, 8), "drop_rate": 0.1}
GROUPS = {"num_samples": (12, 8), "num_neighbors": 4}


def tiny(out="", parts=False, **changes) -> Recipe:
    optim = Optim(lr=1e-2, lr_batch=None, per="update", warmup=0.0, min_lr=0.0)
    words = {"kind": "parts", "model": "pct_ea_partseg", "model_args": TINY} if parts else {}
    words = {"model_args": {**TINY, **GROUPS}, **words, "points": 24, "epochs": 2, "batch_size": 8}
    words |= {"device": "cpu", "log_every": 1, "optim": optim, "out": str(out)}
    words |= {"data": PointData(train_clouds=32, val_clouds=12)}
    return Recipe(**words | changes)


def task(parts=False, **changes) -> points.Points:
    return points.open_task(tiny(parts=parts, **changes), CPU)


def balls(count=6, size=30, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size, 3)).astype(np.float32)


def npz(path, xyz, label, **arrays):
    np.savez(path, xyz=xyz, label=np.array(label), **arrays)
    return PointData(root=str(path))


def test_clouds_lie_in_the_unit_ball_whatever_their_numbers():
    for xyz in (balls()[0] * 1e30 + 1e31, balls()[0] * 1e-30, (balls()[0] * 2047).astype(np.int16)):
        got = in_ball(xyz)
        assert got.dtype == np.float32
        assert np.linalg.norm(got, axis=1).max() == pytest.approx(1, abs=1e-5)
        assert np.abs(got.mean(0)).max() < 1e-5
    assert np.array_equal(in_ball(balls()[0] * 2.0), in_ball(balls()[0]))


def test_every_number_of_points_is_seen_and_padding_is_told(tmp_path):
    for i, count in enumerate((5, 9, 40)):
        (tmp_path / f"{'ab'[i % 2]}" / "train").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / "train" / f"{i}.npy", balls(1, count)[0])
        (tmp_path / "ab"[i % 2] / "test").mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / "test" / f"{i}.npy", balls(1, count)[0])
    share = open_clouds(PointData(root=str(tmp_path)), 24, False).val
    order = [share.counts.tolist().index(n) for n in (5, 9, 40)]
    index = torch.tensor(order)
    seen = view(share, index, 24, torch.rand(3, 40, generator=generator(0)))
    assert seen.mask.sum(1).tolist() == [5, 9, 24]
    assert seen.parts.ge(0).equal(seen.mask)
    for row, i in enumerate(order):
        own = {tuple(p) for p in share.xyz[share.starts[i] : share.starts[i + 1]].tolist()}
        got = [tuple(p) for p in seen.points[row][seen.mask[row]].tolist()]
        assert set(got) <= own
        assert len(set(got)) == len(got)
    first = view(share, index, 24, torch.rand(3, 40, generator=generator(1)), first=True)
    start = int(share.starts[order[2]])
    assert sorted(first.points[2].tolist()) == sorted(share.xyz[start : start + 24].tolist())
    assert first.points[2].tolist() != share.xyz[start : start + 24].tolist()
    assert view(share, index[2:], 24, None).mask is None
    # What the network makes of a cloud does not depend on the padding its batch-mates bring.
    found = points.open_task(tiny(data=PointData(root=str(tmp_path))), CPU)
    network = points.build(found.recipe, found.classes).eval()
    with torch.no_grad():
        together = network(found.seen(index).inputs)
        for row, i in enumerate(order):
            alone = network(found.seen(torch.tensor([i])).inputs)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def augmented(seed=0, mask=None, **words) -> View:
    xyz = torch.from_numpy(balls(64, 50)) / 4
    parts = torch.arange(50).expand(64, -1)
    seen = View(xyz, parts, mask, torch.zeros(64, dtype=torch.int64))
    return changed(seen, replace(PLAIN, **words), generator(seed), torch.arange(64), 64)


def test_dropped_points_become_the_first():
    plain, seen = augmented(), augmented(dropout=0.875)
    moved = (seen.points != plain.points).any(2)
    assert torch.equal(seen.points[moved], plain.points[:, :1].expand_as(plain.points)[moved])
    assert not seen.parts[moved].any()
    shares = moved.double().mean(1)
    assert 0.35 < shares.mean() < 0.52  # half of 0.875
    assert shares.max() <= 0.96
    mask = (torch.arange(50) < 20).expand(64, -1)
    assert torch.equal(augmented(mask=mask, dropout=0.875).points[~mask], plain.points[~mask])


def test_rotations_keep_distances_and_the_up_axis():
    plain = augmented().points
    for axis in "xyz":
        turned = augmented(rotation="z", up=axis).points
        number = "xyz".index(axis)
        torch.testing.assert_close(turned[..., number], plain[..., number])
        other = [i for i in range(3) if i != number]
        torch.testing.assert_close(turned[..., other].norm(dim=2), plain[..., other].norm(dim=2))
        angles = (turned[:, 0, other] * plain[:, 0, other]).sum(1) / plain[:, 0, other].square().sum(1)
        assert angles.min() < -0.8
        assert angles.max() > 0.8
    free = augmented(rotation="so3").points
    far = [torch.pdist(xyz[0].double()) for xyz in (free, plain)]
    torch.testing.assert_close(*far, atol=1e-5, rtol=1e-5)
    means = (free / free.norm(dim=2, keepdim=True)).mean((0, 1))
    assert means.abs().max() < 0.3
    turns = torch.linalg.lstsq(plain.double(), free.double()).solution
    assert torch.linalg.det(turns).sub(1).abs().max() < 1e-5  # no mirror images


def test_scale_shift_and_noise_stay_in_their_ranges():
    plain = augmented().points
    factors = augmented(scale=(2 / 3, 1.5)).points / plain
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-3, atol=1e-3)
    assert 2 / 3 - 1e-3 <= factors.min() < 0.7 < 1.4 < factors.max() <= 1.5 + 1e-3
    assert (factors[:, 0, 0] - factors[:, 0, 1]).abs().max() > 0.1  # each axis alone
    shifts = augmented(translate=0.2).points - plain
    assert 0.18 < shifts.abs().max() <= 0.2 + 1e-6
    noise = augmented(jitter=0.01, clip=0.015).points - plain
    assert noise.std() == pytest.approx(0.009, abs=0.001)
    assert noise.abs().max() == pytest.approx(0.015, abs=1e-6)
    torch.testing.assert_close(plain, torch.from_numpy(balls(64, 50)) / 4)


@pytest.mark.parametrize("parts", [False, True])
def test_an_update_is_the_same_in_pieces_and_after_an_interruption(parts):
    augment = PointAugment(rotation="so3", jitter=0.01)
    found = task(parts, augment=augment)
    whole = list(found.train_batches(1, 0, Part(8, seed=3)))
    assert len(whole) == 4
    again = list(found.train_batches(1, 2, Part(8, seed=3)))
    assert torch.equal(again[0][0]["points"], whole[2][0]["points"])
    other = next(found.train_batches(0, 2, Part(8, seed=3)))
    assert not torch.equal(other[0]["points"], whole[2][0]["points"])
    pieces = [*found.train_batches(1, 2, Part(8, 2, 0, 1, 3))][:2]
    mine = torch.cat([Part(8, 2).rows(torch.arange(8), i) for i in (0, 1)])
    for key in whole[2][0]:
        assert torch.equal(torch.cat([piece[0][key] for piece in pieces]), whole[2][0][key][mine])
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), whole[2][1][mine])
    shares = [[int(i) for b in found.val_batches(rank, 13, 2) for i in b.positions] for rank in range(13)]
    assert sorted(i for share in shares for i in share) == list(range(12))


def test_the_loss_is_the_published_one():
    logits, labels = torch.randn(5, 8, generator=generator(0)), torch.tensor([0, 3, 7, 7, 2])
    wanted = torch.full((5, 8), 0.2 / 7).scatter(1, labels[:, None], 0.8)
    torch.testing.assert_close(task().loss(logits, labels), -(wanted * logits.log_softmax(1)).sum(1).mean())
    many = torch.randn(2, 16, 5, generator=generator(1))
    some = torch.tensor([[0, 3, 15, -1, -1], [1, 1, 1, 4, -1]])
    wanted = torch.full((2, 16, 5), 0.2 / 15).scatter(1, some.clamp(min=0)[:, None], 0.8)
    each = -(wanted * many.log_softmax(1)).sum(1)[some >= 0]
    torch.testing.assert_close(task(True).loss(many, some), each.mean())


def iou_by_hand(guess, truth, own):
    found = []
    for part in own:
        both = sum(g == part == t for g, t in zip(guess, truth, strict=True) if t >= 0)
        either = sum(part in (g, t) for g, t in zip(guess, truth, strict=True) if t >= 0)
        found.append(both / either if either else 1)
    return np.mean(found)


def test_part_figures_are_those_of_shapenet_part():
    own = points.own_parts(["a/x", "a/y", "a/z", "b/x", "b/y"])
    assert own.tolist() == [[True, True, True, False, False], [False, False, False, True, True]]
    chance = np.random.default_rng(0)
    guess, truth = chance.integers(0, 2, (3, 11)), chance.integers(0, 2, (3, 11))
    guess[2] += 3
    truth[2] += 3
    truth[1, 7:] = -1
    labels = [0, 0, 1]
    got = points.shape_iou(torch.tensor(guess), torch.tensor(truth), own[labels])
    want = [iou_by_hand(guess[i], truth[i], own[labels[i]].nonzero()[:, 0].tolist()) for i in range(3)]
    assert got.tolist() == pytest.approx(want)
    assert want[0] > 1 / 3  # a/z, which nobody saw and nobody guessed, counts as 1
    # Logits of other classes' parts are not looked at.
    outputs = torch.zeros(1, 5, 2)
    outputs[0, 4], outputs[0, 1] = 9, 1
    assert points.likeliest(outputs, own[:1]).tolist() == [[1, 1]]
    found = task(True)
    verdicts = torch.tensor([[0, 0, 0.2, 0.5, 1], [1, 0, 0.4, 0.7, 2], [2, 1, 0.9, 0.9, 3.0]])
    scores = found.scores(verdicts.double())
    assert scores["instance_miou"] == pytest.approx(0.5)
    assert scores["class_miou"] == pytest.approx(0.6)
    verdicts = torch.tensor([[0, 1, 1, 0.0], [1, 1, 0, 1], [2, 0, 0, 2], [3, 1, 1, 3]])
    assert task().scores(verdicts.double()) == {
        "accuracy": 0.75,
        "class_accuracy": pytest.approx(5 / 6),
        "loss": 1.5,
    }


def test_votes_average_probabilities():
    found = task(votes=3, augment=PointAugment())
    network = points.build(found.recipe, found.classes).eval()
    batch = found.seen(torch.arange(4))
    with torch.no_grad():
        got = found.outputs(network, batch).exp()
        each = [network(found.seen(torch.arange(4), vote).inputs).softmax(1) for vote in range(3)]
    torch.testing.assert_close(got, sum(each) / 3)
    assert not torch.allclose(each[0], each[1])
    torch.testing.assert_close(got.sum(1), torch.ones(4))
    inputs = [found.seen(torch.arange(4), vote).inputs["points"] for vote in (0, 1)]
    assert not torch.equal(*(x.sort(1).values for x in inputs))  # other points
    parts = task(True, votes=2)
    factor = [parts.seen(torch.arange(4), vote).inputs["points"] for vote in (0, 1)]
    torch.testing.assert_close(factor[1] / factor[0], (factor[1] / factor[0])[:1, :1].expand(4, 24, 3))


def test_solids_are_always_the_same_and_have_their_parts():
    first, again = (solids.solid("torus", 3) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    for label, name in enumerate(solids.CLASSES):
        xyz, part = solids.solid(name, 5)
        assert xyz.shape == (solids.POINTS, 3)
        assert set(part.tolist()) == {2 * label, 2 * label + 1}
    xyz, part = solids.solid("cylinder", 5)
    height = xyz[part == solids.PARTS.index("cylinder/caps"), 2]
    assert (np.minimum(height - xyz[:, 2].min(), xyz[:, 2].max() - height) < 0.2).all()
    found = solids.generate()
    assert len(found.items["train"]) == 480
    names = {item.name for items in found.items.values() for item in items}
    assert len(names) == 640


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "parts"}, "model: expected pct_ea_partseg or pct_partseg with kind parts, got"),
        ({"points": 1}, "points: expected"),
        ({"votes": 0}, "votes: expected"),
        ({"drop_path": 0.1}, "drop_path: expected 0"),
        ({"batch_size": 8, "accumulate": 8}, "batch_size: expected at least 2 clouds"),
        ({"augment": PointAugment(scale=(1.5, 0.5))}, "augment.scale: expected two factors"),
        ({"augment": PointAugment(dropout=1.5)}, "augment.dropout"),
        ({"augment": PointAugment(rotation="y")}, "augment.rotation: expected one of none, z, so3, got 'y'"),  # pyright: ignore
        ({"model_args": {"dept": 3}}, "model_args: expected words that pct_ea_cls takes"),
    ],
)
def test_settings_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        points.build(tiny(**words).checked(), ["a", "b"])


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism_takes_a_step(mechanism):
    found = replace(recipes.recipe(f"points_{mechanism}"), data=PointData(train_clouds=8, val_clouds=4))
    opened = points.open_task(found.checked(), CPU)
    network = points.build(found, opened.classes)
    inputs, targets = next(opened.train_batches(0, 0, Part(8)))
    loss = opened.loss(network(inputs), targets)
    loss.backward()
    assert loss.isfinite()
    mixers = network.mixers()
    assert len(mixers) == (0 if mechanism == "softmax" else 2)
    assert all(type(mixer) is layers.mechanism(mechanism) for mixer in mixers.values())


def test_parts_with_every_mechanism_that_needs_no_order():
    free = {name for name, layer in layers.mechanisms().items() if not layer.traits.needs}
    assert {name.removeprefix("points_parts_") for name in recipes.names() if "points_parts" in name} == free
    for mechanism in free:
        recipe = replace(
            recipes.recipe(f"points_parts_{mechanism}"), data=PointData(train_clouds=8, val_clouds=4)
        ).checked()
        found = points.open_task(recipe, CPU)
        inputs, targets = next(found.train_batches(0, 0, Part(8)))
        found.loss(points.build(recipe, found.classes)(inputs), targets).backward()


def features(share):
    """Of as many points as the network sees: 17 quantiles of the distances from the centre, and the
    eigenvalues of the covariance."""
    found = []
    for start in share.starts[:-1]:
        xyz = share.xyz[start : start + 128].double().numpy()
        far = np.quantile(np.linalg.norm(xyz, axis=1), np.linspace(0, 1, 17))
        found.append(np.r_[far, np.linalg.eigvalsh(np.cov(xyz.T))])
    return np.array(found)


def test_a_small_run_learns_more_than_distances_and_eigenvalues(tmp_path):
    recipe = recipes.recipe("points_external")
    words = {**recipe.model_args, "num_neighbors": 8}
    recipe = replace(recipe, epochs=10, points=128, model_args=words, out=str(tmp_path / "run"), device="cpu")
    outcome = run(recipe)
    clouds = open_clouds(recipe.data, recipe.points, False)
    simple = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    simple.fit(features(clouds.train), clouds.train.labels)
    baseline = simple.score(features(clouds.val), clouds.val.labels)
    assert baseline > 3 / 8
    assert outcome.curve[-1]["accuracy"] > baseline + 0.08
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("overall accuracy", "Held-out clouds", "What fewer points cost", "clouds/s"):
        assert words in page


def test_a_small_run_finds_more_than_the_most_frequent_part(tmp_path):
    recipe = recipes.recipe("points_parts_external")
    recipe = replace(recipe, epochs=3, points=128, out=str(tmp_path / "run"), device="cpu")
    recipe = replace(recipe, data=PointData(train_clouds=240, val_clouds=64))
    outcome = run(recipe)
    clouds = open_clouds(recipe.data, recipe.points, True)
    own = points.own_parts(clouds.parts)
    counts = torch.zeros(8, 16)
    for label, row in zip(clouds.train.labels, clouds.train.parts.view(-1, solids.POINTS), strict=True):
        counts[label] += row.bincount(minlength=16)
    truth = clouds.val.parts.view(-1, solids.POINTS)
    guess = counts.argmax(1)[clouds.val.labels][:, None].expand_as(truth)
    baseline = points.shape_iou(guess, truth, own[clouds.val.labels]).mean()
    assert 0.2 < baseline < 0.5
    assert outcome.score > baseline + 0.2
    assert "Held-out clouds by part" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("parts", [False, True])
def test_going_on_repeats_every_weight(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(runs.artifacts, "report", lambda *_: None)
    monkeypatch.setattr(points.Points, "pictures", lambda *_: [])
    words = {"save_every": 3, "augment": PointAugment(rotation="z", jitter=0.01), "parts": parts}
    whole = run(tiny(tmp_path / "whole", **words))
    loss, calls = points.Points.loss, []

    def failing(self, outputs, targets):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, outputs, targets)

    with monkeypatch.context() as patched:
        patched.setattr(points.Points, "loss", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(tmp_path / "part", **words))
    rest = run(tiny(tmp_path / "part", resume=True, **words))
    assert rest.curve == whole.curve
    for name in ("weights", "best"):
        first, second = (
            safetensors.torch.load_file(tmp_path / f / f"{name}.safetensors") for f in ("whole", "part")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for parts in (False, True):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(runs.artifacts, "report", lambda *_: None)
            patched.setattr(points.Points, "pictures", lambda *_: [])
            run(tiny(folder / ("parts" if parts else "classes"), parts=parts))
    return folder


def test_eval_and_its_flags(trained, capsys, tmp_path):
    for kind, figure, words in (
        ("classes", "accuracy", "overall accuracy"),
        ("parts", "instance_miou", "instance mIoU"),
    ):
        out = tmp_path / f"{kind}.json"
        assert main(["eval", str(trained / kind), "--device", "cpu", "--out", str(out)]) == 0
        told = json.loads(out.read_text())
        best = json.loads((trained / kind / "recipe.json").read_text())["best"]
        assert told["figures"][figure] == pytest.approx(best)
        assert f"{words} {100 * best:.1f} %" in capsys.readouterr().out
    flags = ["--points", "9", "--votes", "3", "--data.val-clouds", "7", "--out", str(out)]
    assert main(["eval", str(trained / "classes"), *flags]) == 0
    told = json.loads(out.read_text())
    assert (told["samples"], told["recipe"]["points"], told["recipe"]["votes"]) == (7, 9, 3)


def test_predict_writes_a_row_for_every_cloud(trained, capsys, tmp_path):
    found = points.open_task(tiny(), CPU)
    clouds = tmp_path / "clouds"
    (clouds / "deep").mkdir(parents=True)
    names = []
    for i in range(3):
        xyz = found.clouds.val.xyz[found.clouds.val.starts[i] : found.clouds.val.starts[i + 1]]
        np.save(clouds / "deep" / f"{i}.npy", 100 * xyz.numpy() + 7)
        names.append(f"deep/{i}.npy")
    np.savez(clouds / "many.npz", xyz=balls(2), label=[0, 0])
    (clouds / "bad.xyz").write_text("0 0 0\n")
    out = tmp_path / "out.csv"
    what, flags = str(trained / "classes"), ["--out", str(out), "--batch-size", "2"]
    assert main(["predict", what, str(clouds), *flags]) == 0
    assert f"{out}: 6 rows, 1 of them with an error" in capsys.readouterr().out
    with out.open() as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    assert set(table) == {*names, "many.npz[0]", "many.npz[1]", "bad.xyz"}
    assert table["bad.xyz"]["error"] == "1 points"
    from sansmax.train.trained import load_trained

    network = load_trained(str(trained / "classes")).model
    with torch.no_grad():
        wanted = network(found.seen(torch.arange(3)).inputs).softmax(1)
    for name, row in zip(names, wanted, strict=True):
        assert table[name]["class"] == found.classes[int(row.argmax())]
        assert float(table[name]["probability"]) == pytest.approx(row.max().item(), abs=2e-3)
    for source, out in (("bad.xyz", "a.csv"), ("none", "a.csv"), ("many.npz", "a.txt")):
        assert main(["predict", what, str(clouds / source), "--out", out]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_predict_writes_the_part_of_every_point(trained, capsys, tmp_path):
    xyz, _ = solids.solid("torus", 1)
    (tmp_path / "torus").mkdir()
    np.save(tmp_path / "torus" / "a.npy", xyz)
    np.save(tmp_path / "torus" / "few.npy", xyz[:5])
    np.save(tmp_path / "torus" / "bad.npy", xyz[:1])
    what, out = str(trained / "parts"), tmp_path / "out"
    assert main(["predict", what, str(tmp_path / "torus"), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "2 clouds, 1 skipped" in told
    assert "skipped bad.npy: 1 points" in told
    found = np.load(out / "a.npz")
    assert np.array_equal(found["xyz"], xyz)
    assert found["part"].shape == (512,)
    assert set(found["part"].tolist()) <= {14, 15}
    assert found["parts"][14] == "torus/inner"
    assert len(np.load(out / "few.npz")["part"]) == 5
    flags = ["--category", "sphere", "--form", "ply", "--votes", "2"]
    assert main(["predict", what, str(tmp_path / "torus" / "a.npy"), "--out", str(out), *flags]) == 0
    again = read_cloud(out / "a.ply", 0)[0]
    np.testing.assert_allclose(again, xyz, rtol=1e-6)
    capsys.readouterr()
    assert main(["predict", what, str(tmp_path / "torus" / "a.npy"), "--category", "toros"]) == 2
    assert "category: expected one of box, capsule" in capsys.readouterr().err
    assert main(["predict", what, str(tmp_path / "torus" / "bad.npy"), "--out", str(out)]) == 2
    assert math.isfinite(json.loads((trained / "parts" / "recipe.json").read_text())["best"])

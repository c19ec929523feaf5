"""What an update does: skipped steps, averages, accumulated batches, precision, teachers, going on."""

import json
from dataclasses import replace

import pytest
import torch
from forked import together
from torch import nn

from sansmax import create_model
from sansmax.tasks.classification import Classification, Teacher
from sansmax.train import loop
from sansmax.train.checkpoint import States
from sansmax.train.loop import train
from small_task import digits, network, recipe


def lines(folder, kind="train"):
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def states(folder):
    """By update."""
    found = [torch.load(path, weights_only=True) for path in States(folder / "states").paths()]
    return {state["position"]["update"]: state for state in found}


def same(a, b):
    """Bit for bit, in nested dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Spoilt(Classification):
    """Images, losses or gradients of some updates are not finite."""

    how, at = "image", (2,)

    def train_batches(self, epoch, update, part):
        for number, (images, targets) in enumerate(super().train_batches(epoch, update, part), update):
            self.now = epoch * 4 + number
            if self.now in self.at and self.how == "image":
                images[7, 0, 3, 3] = float("nan")
            yield images, targets

    def loss(self, outputs, targets):
        loss = super().loss(outputs, targets)
        if self.now in self.at and self.how == "loss":
            loss = loss * float("inf")
        if self.now in self.at and self.how == "gradient":
            loss = loss + (0 * outputs).abs().sqrt().sum()
        return loss


def spoilt(how, at=(2,)):
    task = digits(kind=Spoilt)
    task.how, task.at = how, at
    return task


def with_norm():
    return network(nn.BatchNorm1d(24), nn.ReLU())


class Crash(Exception):
    """Of the caller's own code."""


@pytest.mark.parametrize("how", ["image", "loss", "gradient"])
def test_an_update_that_is_not_finite_leaves_no_trace(how, tmp_path):
    words = recipe({"ema": 0.8}, save_every=1, keep=20)
    outcome = train(with_norm(), spoilt(how), words, tmp_path)
    assert outcome.skipped == 1
    kept = states(tmp_path)
    for name in ("model", "optimizer", "average"):
        # the schedule moves on
        for state in kept.values():
            for key in [key for key in state["optimizer"] if key.startswith("param_groups")]:
                del state["optimizer"][key]
            state["optimizer"].pop("param_groups", None)
        assert same(kept[2][name], kept[3][name]), name
        assert not same(kept[3][name], kept[4][name]), name
    assert all(value.isfinite().all() for value in kept[8]["model"].values())
    told = lines(tmp_path)
    assert [line["skipped_steps"] for line in told] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["loss"] is None for line in told] == [False, False, True] + [False] * 5
    assert [line["grad_norm"] is None for line in told] == [False, False, True] + [False] * 5
    good = [line["loss"] for line in told[:4] if line["loss"] is not None]
    assert outcome.curve[0]["loss"] == pytest.approx(sum(good) / 3)


def test_a_crash_in_the_callers_code_changes_nothing_for_the_run_that_goes_on(tmp_path):
    words = recipe({"ema": 0.8}, bad_steps=2)
    whole, half = tmp_path / "whole", tmp_path / "half"
    expected = train(with_norm(), spoilt("image", (2, 5)), words, whole)

    def crash(*_):
        raise Crash

    with pytest.raises(Crash):
        train(with_norm(), spoilt("image", (2, 5)), words, half, crash)
    outcome = train(with_norm(), spoilt("image", (2, 5)), replace(words, resume=True), half)
    assert outcome.skipped == expected.skipped == 2
    assert outcome.curve == expected.curve
    assert torch.equal(outcome.verdicts, expected.verdicts)
    assert [line["skipped_steps"] for line in lines(half)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["epoch"] for line in lines(half, "eval")] == [1, 2]


def test_bad_updates_in_a_row_stop_the_run_and_name_the_state(tmp_path):
    words = recipe(save_every=3, bad_steps=2)
    with pytest.raises(
        ValueError, match=f"got 2 updates in a row .* update 4 of 8 is saved in {tmp_path}, go"
    ):
        train(with_norm(), spoilt("loss", (4, 5)), words, tmp_path)
    assert sorted(states(tmp_path)) == [3, 4]
    outcome = train(with_norm(), spoilt("loss", ()), replace(words, resume=True), tmp_path)
    assert outcome.skipped == 0


def test_the_first_updates_may_be_bad_too(tmp_path):
    """An optimiser that has taken no step has no state to save."""
    words = recipe({"ema": 0.5}, save_every=1, keep=20)
    expected = train(with_norm(), spoilt("loss", (0, 1)), recipe({"ema": 0.5}))
    outcome = train(with_norm(), spoilt("loss", (0, 1)), words, tmp_path)
    assert outcome.curve == expected.curve
    for path in States(tmp_path / "states").paths()[2:]:
        path.unlink()
    again = train(with_norm(), spoilt("loss", (0, 1)), replace(words, resume=True), tmp_path)
    assert again.curve == expected.curve
    assert torch.equal(again.verdicts, expected.verdicts)


def test_the_average_is_its_definition(tmp_path):
    seen = []
    start = {name: value.clone() for name, value in with_norm().state_dict().items()}
    words = recipe({"ema": 0.7}, epochs=1, batch_size=40, save_every=1, keep=9)
    model = with_norm()
    train(model, digits(), words, tmp_path, lambda _, evaluated, __: seen.append(evaluated))
    average, kept = start, states(tmp_path)
    assert sorted(kept) == [1, 2, 3, 4, 5]
    for update in range(1, 6):
        now = kept[update]["model"]
        average = {
            name: 0.7 * value + 0.3 * now[name] if value.is_floating_point() else now[name]
            for name, value in average.items()
        }
        for name, value in average.items():
            torch.testing.assert_close(kept[update]["average"][name], value, rtol=1e-5, atol=1e-6)
    assert "2.running_var" in average
    assert average["2.num_batches_tracked"] == 5
    assert same(dict(seen[0].state_dict()), kept[5]["average"])
    assert same(dict(model.state_dict()), kept[5]["model"])


def test_the_weights_themselves_are_evaluated_if_asked(tmp_path):
    seen = []
    words = recipe({"ema": 0.7, "evaluate_ema": False}, epochs=1)
    model = with_norm()
    train(model, digits(), words, tmp_path, lambda _, evaluated, __: seen.append(evaluated))
    assert seen == [model]
    assert states(tmp_path)[4]["average"] is not None


def test_accumulated_batches_are_the_large_batch(tmp_path):
    for pieces in (1, 2, 5):
        words = recipe({"opt": "momentum", "clip": 0.3}, batch_size=100, accumulate=pieces)
        train(network(), digits(), words, tmp_path / str(pieces))
    one, *others = (lines(tmp_path / str(pieces)) for pieces in (1, 2, 5))
    assert one[0]["grad_norm"] > 0.3
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def vit(**words):
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "in_chans": 1, "num_classes": 10}
    return create_model("vit_mini", "sima", **size | words)


def vit_losses(folder, model=None, **changes):
    changes = {"model": "vit_mini", "batch_size": 100, **changes}
    train(model or vit(), digits(), recipe({"lr": 1e-3}, **changes), folder)
    return torch.tensor([line["loss"] for line in lines(folder)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return vit_losses(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"checkpointing": True}, 1e-6),
        ({"channels_last": True}, 1e-5),
        ({"precision": "bf16"}, 0.02),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "channels_last", "bf16", "compile"],
)
def test_other_ways_to_compute_give_the_same_losses(plain, tmp_path, changes, tolerance):
    found = vit_losses(tmp_path, **changes)
    assert len(found) == 4
    assert (found - plain).abs().max() < tolerance
    if "precision" in changes:
        assert not torch.equal(found, plain)
        kept = states(tmp_path)[4]["model"]
        assert {value.dtype for value in kept.values()} == {torch.float32}


def test_checkpointing_recomputes_and_what_cannot_is_refused(monkeypatch, tmp_path):
    calls = []
    forward = nn.GELU.forward
    monkeypatch.setattr(
        nn.GELU, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x)
    )
    vit_losses(tmp_path / "a", epochs=1)
    once = sum(calls)
    calls.clear()
    vit_losses(tmp_path / "b", epochs=1, checkpointing=True)
    assert sum(calls) == 2 * once > 0
    with pytest.raises(ValueError, match=r"checkpointing: expected a network with set_grad_checkpointing"):
        train(network(), digits(), recipe(checkpointing=True))


def test_drop_path_drops_by_the_seed_in_training_alone(plain, tmp_path):
    one, two = (vit_losses(tmp_path / name, vit(drop_path_rate=0.5)) for name in "ab")
    assert torch.equal(one, two)
    assert not torch.equal(one, plain)
    assert lines(tmp_path / "a", "eval")[-1]["top1"] == lines(tmp_path / "b", "eval")[-1]["top1"]


class Table(nn.Module):
    """A teacher that always says the same logits."""

    def forward(self, images):
        return torch.arange(10.0).expand(len(images), 10)


def test_a_teacher_adds_its_loss_by_hand():
    logits = torch.randn(6, 10)
    labels = torch.tensor([0, 3, 9, 9, 1, 2])
    opinion = torch.arange(10.0).expand(6, 10)
    base = nn.functional.cross_entropy(logits, labels)
    hard = digits(teacher=Teacher(Table(), "hard", alpha=0.25))
    expected = 0.75 * base - 0.25 * logits.log_softmax(1)[:, 9].mean()
    assert hard.loss(logits, (labels, opinion)).item() == pytest.approx(expected.item(), rel=1e-5)
    soft = digits(teacher=Teacher(Table(), "soft", alpha=0.25, tau=3.0))
    p = (opinion / 3).softmax(1)
    kl = (p * (p.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    expected = 0.75 * base + 0.25 * 9 * kl
    assert soft.loss(logits, (labels, opinion)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_network_learns_from_its_teacher_alone(kind):
    model = network()
    outcome = train(model, digits(teacher=Teacher(Table(), kind, alpha=1.0)), recipe(epochs=4))
    assert outcome.predictions == [9] * 70


class Pair(nn.Module):
    """Two outputs in training, their mean otherwise, as DeiT's distillation token; or always two."""

    def __init__(self, always=False):
        super().__init__()
        self.a, self.b, self.always = network(), network(), always

    def forward(self, x):
        first, second = self.a(x), self.b(x)
        return (first, second) if self.training or self.always else (first + second) / 2


def test_two_outputs_learn_the_labels_and_the_teacher():
    model = Pair()
    train(model, digits(teacher=Teacher(Table(), "hard")), recipe(epochs=6))
    images = torch.cat([batch.images for batch in digits().val_batches(0, 1, 70)])
    assert (model.b(images).argmax(1) == 9).all()
    assert len(set(model.a(images).argmax(1).tolist())) > 5


def test_a_network_that_gives_no_logits_in_evaluation_is_named():
    with pytest.raises(ValueError, match=r"model: expected logits \(B, classes\) in evaluation, got tuple"):
        train(Pair(always=True), digits(), recipe(epochs=1))


class Partly(nn.Module):
    """One weight is frozen, and one is never used."""

    def __init__(self):
        super().__init__()
        self.body, self.unused = network(), nn.Linear(3, 3)
        self.body[1].bias.requires_grad_(False)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("opt", ["adamw", "momentum", "lamb"])
def test_frozen_and_unused_weights_stay_and_do_not_hinder_going_on(opt, tmp_path):
    words = recipe({"opt": opt, "weight_decay": 0.1})
    expected = train(Partly(), digits(), words)
    with pytest.raises(Crash):
        train(Partly(), digits(), words, tmp_path, crash)
    model = Partly()
    outcome = train(model, digits(), replace(words, resume=True), tmp_path)
    assert outcome.curve == expected.curve
    assert torch.equal(model.body[1].bias, Partly().body[1].bias)


def crash(*_):
    raise Crash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("curve") and p.pop("update"), None),
        (lambda p: p.update(color="blue"), "unexpected keyword argument 'color'"),
    ],
)
def test_states_of_other_versions(tmp_path, change, words):
    with pytest.raises(Crash):
        train(network(), digits(), recipe(), tmp_path, crash)
    for path in States(tmp_path / "states").paths():
        state = torch.load(path, weights_only=True)
        change(state["position"])
        torch.save(state, path)
    again = recipe(resume=True)
    if words is None:  # a field that is missing has its default
        assert len(train(network(), digits(), again, tmp_path).curve) == 2
    else:
        with pytest.raises(ValueError, match=f"resume: expected the state of this network .* got .*{words}"):
            train(network(), digits(), again, tmp_path)


def test_states_without_resume_are_not_overwritten(tmp_path):
    train(network(), digits(), recipe(), tmp_path)
    before = [path.read_bytes() for path in States(tmp_path / "states").paths()]
    with pytest.raises(ValueError, match=r"out: expected a new folder, got .* with states of a run in it"):
        train(network(), digits(), recipe(), tmp_path)
    assert [path.read_bytes() for path in States(tmp_path / "states").paths()] == before


@pytest.mark.parametrize("classes", [1, 2, 5, 6])
def test_few_classes_and_top5(classes, tmp_path):
    task = digits(train=60, val=30)
    task.source._train[1].remainder_(classes)
    task.source._val[1].remainder_(classes)
    task.classes = task.classes[:classes]
    outcome = train(network(classes=classes), task, recipe(batch_size=30), tmp_path)
    assert ("top5" in outcome.curve[-1]) == (classes > 5) == ("top5" in lines(tmp_path, "eval")[-1])
    assert outcome.verdicts.shape == (30, 4 + 2 * min(5, classes))
    assert classes > 1 or (outcome.score, outcome.curve[-1]["val_loss"]) == (1.0, 0.0)


def test_no_held_out_images_are_named():
    with pytest.raises(ValueError, match="data: expected held-out images that can be read, got none; check"):
        train(network(), digits(val=0), recipe(epochs=1))


def test_fewer_batches_than_an_epoch_has_are_named(tmp_path):
    task = digits()
    batches = task.train_batches
    task.train_batches = lambda *arguments: iter(list(batches(*arguments))[:3])
    words = "data: expected images for every update of an epoch, got fewer; .* nothing was saved yet in"
    with pytest.raises(ValueError, match=words):
        train(network(), task, recipe(), tmp_path)


def test_an_evaluation_that_is_not_finite_is_told_and_training_goes_on(tmp_path):
    task = digits()
    task.source._val[0][0] = 0
    task.source._normalised = lambda pixels, f=task.source._normalised: f(pixels).where(
        pixels.flatten(1).any(1)[:, None, None, None].bool(), torch.nan
    )
    outcome = train(network(), task, recipe(), tmp_path)
    assert len(outcome.curve) == 2
    assert [line["loss"] for line in lines(tmp_path, "eval")] == [None, None]
    assert all(line["loss"] for line in lines(tmp_path))


def test_evaluation_takes_no_larger_batches_than_training_could():
    seen = []
    task = digits(val=70)
    batches = task.val_batches
    task.val_batches = lambda rank, world, size: seen.append(size) or batches(rank, world, size)
    for size, pieces in [(4, 2), (100, 1)]:
        train(network(), task, recipe(epochs=1, batch_size=size, accumulate=pieces))
    assert seen == [8, 256]


def test_position_times_and_lines_of_a_run(tmp_path):
    train(network(), digits(), recipe(log_every=3, epochs=2), tmp_path)
    told, found = lines(tmp_path), lines(tmp_path, "eval")
    assert [(line["update"], line["epoch"]) for line in told] == [(3, 0.75), (6, 1.5)]
    assert [(line["update"], line["epoch"]) for line in found] == [(4, 1), (8, 2)]
    for line in told:
        assert list(line) == [
            *("kind", "update", "epoch", "lr", "grad_norm", "loss", "images_per_s", "data_wait", "seconds"),
            "skipped_steps",
        ]
        assert 0 <= line["data_wait"] <= 1
        assert line["images_per_s"] > 0
    assert told[0]["seconds"] < told[1]["seconds"]
    assert list(found[0]) == ["kind", "update", "epoch", "top1", "top5", "loss", "seconds", "eval_seconds"]


def uneven(parallel, folder):
    """Two processes evaluate 17 and 16 images in batches of 8."""
    loop.parallel.UNIT = 1  # every block is gathered by itself
    seen = []
    words = recipe(parallel=parallel, batch_size=4, epochs=1)
    outcome = train(
        vit(), digits(train=24, val=33), words, folder, lambda _, evaluated, __: seen.append(evaluated)
    )
    assert outcome.verdicts[:, 0].tolist() == list(range(33))
    # In an evaluation, too, it exchanges buffers at every forward pass, which hangs NCCL.
    assert not isinstance(seen[0], nn.parallel.DistributedDataParallel)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_with_unequally_many_evaluation_batches_wait_for_none(parallel, tmp_path):
    together(2, uneven, parallel, tmp_path)


def test_a_process_without_held_out_images_takes_part(tmp_path):
    together(2, lonely, tmp_path)


def lonely(folder):
    outcome = train(vit(), digits(train=24, val=1), recipe(parallel="fsdp", batch_size=4, epochs=1), folder)
    assert outcome.verdicts[:, 0].tolist() == [0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_unused_weights_and_several_processes(parallel):
    together(2, unused, parallel)


def unused(parallel):
    words = recipe(parallel=parallel, batch_size=20)
    if parallel == "fsdp":
        assert len(train(Partly(), digits(train=60), words).curve) == 2
    else:
        with pytest.raises(ValueError, match="parallel: expected a network of which every weight is used"):
            train(Partly(), digits(train=60), words)


def test_runs_of_different_precision_follow_each_other_in_one_process():
    for precision in ("fp32", "bf16", "fp32"):
        assert len(train(network(), digits(), recipe(precision=precision, epochs=1)).curve) == 1
    assert loop.train is train

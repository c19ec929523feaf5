"""The training loop, and files that are written whole or not at all."""

import dataclasses
import errno

import pytest
import torch
from torch import nn

from sansmax.tasks._data import load_images
from sansmax.tasks.classification import Classification
from sansmax.train import checkpoint
from sansmax.train.loop import Budget, evaluate, train

BUDGET = Budget(epochs=2, batch_size=50, lr=1e-2)


@pytest.fixture(scope="module")
def task():
    """200 digits to train, 70 to test."""
    digits = load_images()
    return Classification(
        dataclasses.replace(
            digits,
            train_images=digits.train_images[:200],
            train_labels=digits.train_labels[:200],
            val_images=digits.val_images[:70],
            val_labels=digits.val_labels[:70],
        )
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Dropout(0.1), nn.ReLU(), nn.Linear(24, 10))


class Spy(Classification):
    """Notes which images it is asked for, and may spoil the loss."""

    def __init__(self, task, factor=1.0):
        super().__init__(task.images)
        self.batches, self.factor = [], factor

    def train_batch(self, index, generator):
        self.batches.append((index, x := super().train_batch(index, generator)[0]))
        return x, self.images.train_labels[index]

    def loss(self, outputs, targets):
        return super().loss(outputs, targets) * self.factor


def test_a_run_repeats_bit_for_bit_and_learns(task):
    networks = [network() for _ in range(3)]  # the state of the global generator differs between the runs
    one, two, other = (
        train(model, task, dataclasses.replace(BUDGET, epochs=6, seed=seed))
        for model, seed in zip(networks, (3, 3, 4), strict=True)
    )
    assert one.curve == two.curve
    assert one.predictions == two.predictions
    assert one.curve != other.curve
    assert one.curve[-1]["loss"] < one.curve[0]["loss"]
    assert one.score > 0.5


def test_the_outcome_belongs_to_the_network_that_was_trained_in_place(task):
    model, told = network(), []
    outcome = train(model, task, BUDGET, told.append)
    score, predictions = evaluate(model, task, batch_size=33)
    assert outcome.score == score
    assert outcome.predictions == predictions.tolist()
    assert score == pytest.approx((predictions == task.images.val_labels).float().mean().item())
    assert told == outcome.curve
    assert [point["epoch"] for point in told] == [1, 2]
    assert outcome.images_per_s == pytest.approx(2 * 200 / outcome.train_seconds)


def test_two_networks_of_one_seed_see_the_same_batches(task):
    spies = [Spy(task), Spy(task)]
    train(network(), spies[0], BUDGET)
    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), spies[1], BUDGET)
    assert len(spies[0].batches) == 8
    for (a, x), (b, y) in zip(spies[0].batches, spies[1].batches, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    first_epoch = torch.cat([index for index, _ in spies[0].batches[:4]])
    assert torch.equal(first_epoch.sort().values, torch.arange(200))


def test_an_incomplete_batch_is_left_out_and_a_small_set_is_one_batch(task):
    spy = Spy(task)
    train(network(), spy, dataclasses.replace(BUDGET, batch_size=60, epochs=1))
    assert [len(index) for index, _ in spy.batches] == [60, 60, 60]
    spy = Spy(task)
    train(network(), spy, dataclasses.replace(BUDGET, batch_size=999, epochs=1))
    assert [len(index) for index, _ in spy.batches] == [200]


def test_gradients_are_clipped_and_the_rate_warms_up_and_falls(task, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    model = network()
    train(model, Spy(task, 1e4), dataclasses.replace(BUDGET, epochs=5))
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(1e-4)
    assert rates.index(max(rates)) == 2
    assert max(rates) > 0.009
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 2e-4


def test_biases_and_norms_do_not_decay(task, monkeypatch):
    groups = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: groups.append(self.param_groups) or step(self, *a)
    )
    train(network(), task, dataclasses.replace(BUDGET, epochs=1))
    decay = {p.ndim: group["weight_decay"] for group in groups[0] for p in group["params"]}
    assert decay == {1: 0.0, 2: 0.05}


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_a_sentence(task, factor):
    with pytest.raises(
        ValueError, match=r"loss became (nan|inf) in epoch 1 of 2 \(lr 0.01, seed 0\).*lower the"
    ):
        train(network(), Spy(task, factor), BUDGET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(task):
    with pytest.raises(ValueError, match="expected device 'cuda', but this process is bound to cpu"):
        train(network(), task, dataclasses.replace(BUDGET, device="cuda"))


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"x": [1, 2.5]})
    assert checkpoint.read_json(path) == {"x": [1, 2.5]}
    assert checkpoint.read_json(tmp_path / "none.json") is None

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"write .*a.json, got 'No space left on device'; make room.*is kept"):
        checkpoint.write_json(path, {"x": 3})
    assert checkpoint.read_json(path) == {"x": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_tried_before_it_is_needed(tmp_path, monkeypatch):
    checkpoint.prepare_folder(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a folder, got a file at"):
        checkpoint.prepare_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="got 'Not a directory'"):
        checkpoint.prepare_folder(tmp_path / "file" / "below")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"expected to be able to write .*, got 'Permission denied'"):
        checkpoint.prepare_folder(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*a.json, got something else; remove"):
        checkpoint.read_json(tmp_path / "a.json")

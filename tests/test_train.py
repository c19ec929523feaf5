"""The training loop, and files that are written whole or not at all."""

import errno

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sansmax.tasks.classification import Classification
from sansmax.train import checkpoint
from sansmax.train.loop import train
from sansmax.train.verdicts import evaluate
from small_task import digits, network, recipe


@pytest.fixture(scope="module")
def task():
    return digits()


def noisy():
    return network(nn.Dropout(0.1), nn.ReLU())


class Spy(Classification):
    """Notes the images it gives, and may spoil the loss."""

    factor = 1.0

    def train_batches(self, epoch, update, part):
        self.positions = getattr(self, "positions", [])
        self.images = getattr(self, "images", [])
        self.source.train, train = self._noted(self.source.train), self.source.train
        try:
            for images, targets in super().train_batches(epoch, update, part):
                self.images.append(images)
                yield images, targets
        finally:
            self.source.train = train

    def _noted(self, batches):
        def noted(*arguments):
            for batch in batches(*arguments):
                self.positions.append(batch.positions)
                yield batch

        return noted

    def loss(self, outputs, targets):
        return super().loss(outputs, targets) * self.factor


def test_a_run_repeats_bit_for_bit_and_learns(task):
    networks = [noisy() for _ in range(3)]  # the state of the global generator differs between the runs
    one, two, other = (
        train(model, task, recipe(epochs=6, seed=seed))
        for model, seed in zip(networks, (3, 3, 4), strict=True)
    )
    assert one.curve == two.curve
    assert one.predictions == two.predictions
    assert one.curve != other.curve
    assert one.curve[-1]["loss"] < one.curve[0]["loss"]
    assert one.score > 0.5


def test_the_outcome_belongs_to_the_network_that_was_trained_in_place(task):
    model, told = noisy(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = train(model, task, recipe(), None, lambda *point: told.append(point))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    verdicts = evaluate(model, task, Accelerator(cpu=True), batch_size=33)
    found = task.scores(verdicts)
    labels = task.source._val[1]
    images = torch.cat([batch.images for batch in task.val_batches(0, 1, 70)])
    logits = model(images)
    assert outcome.score == found["top1"] == (logits.argmax(1) == labels).double().mean().item()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert outcome.curve[-1]["top5"] == found["top5"] == top5
    assert outcome.curve[-1]["val_loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    assert outcome.predictions == logits.argmax(1).tolist() == verdicts[:, 4].tolist()
    assert [point for point, _, _ in told] == outcome.curve
    assert all(evaluated is model for _, evaluated, _ in told)
    assert torch.equal(told[-1][2], outcome.verdicts)
    assert [sorted(point) for point in outcome.curve] == [["epoch", "loss", "top1", "top5", "val_loss"]] * 2
    assert [point["epoch"] for point in outcome.curve] == [1, 2]
    assert outcome.images_per_s == pytest.approx(2 * 200 / outcome.train_seconds)
    assert outcome.skipped == 0


def test_two_networks_of_one_seed_see_the_same_batches():
    spies = [digits(kind=Spy) for _ in range(2)]
    train(noisy(), spies[0], recipe())
    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), spies[1], recipe())
    assert len(spies[0].positions) == 8
    for a, b in zip(spies[0].positions, spies[1].positions, strict=True):
        assert torch.equal(a, b)
    for x, y in zip(spies[0].images, spies[1].images, strict=True):
        assert torch.equal(x, y)
    first, second = (torch.cat(spies[0].positions[i : i + 4]) for i in (0, 4))
    assert torch.equal(first.sort().values, torch.arange(200))
    assert not torch.equal(first, second)


def test_an_incomplete_batch_is_left_out_and_a_small_set_is_one_batch():
    for size, seen in [(60, [60, 60, 60]), (999, [200]), (1, [1] * 200)]:
        spy = digits(kind=Spy)
        outcome = train(network(), spy, recipe(batch_size=size, epochs=1))
        assert [len(index) for index in spy.positions] == seen
        assert outcome.images_per_s == pytest.approx(sum(seen) / outcome.train_seconds)


def test_gradients_are_clipped_and_the_rate_warms_up_and_falls(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append((self.param_groups[0]["lr"], torch.stack([g.norm() for g in grads]).norm().item()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    task = digits(kind=Spy)
    task.factor = 1e4
    train(network(), task, recipe({"clip": 1.0, "warmup": 0.5, "warmup_lr": 1e-4}, epochs=5))
    rates, norms = zip(*seen, strict=True)
    assert norms == pytest.approx([1.0] * 20, rel=1e-3)
    assert rates[0] == pytest.approx(1e-4)
    assert rates.index(max(rates)) == 2
    assert max(rates) > 0.009
    assert list(rates[2:]) == sorted(rates[2:], reverse=True)
    assert rates[-1] < 2e-4
    seen.clear()
    train(network(), task, recipe({"clip": None}, epochs=1))
    assert min(norm for _, norm in seen) > 100


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_losses_that_are_never_finite_stop_with_a_sentence(factor):
    task = digits(kind=Spy)
    task.factor = factor
    words = (
        r"training: expected finite losses and gradients, got 3 updates in a row without, up to update 3 "
        r"of 8 \(loss (nan|inf), gradient nan, lr 0.01, seed 0\); begin in another folder with a lower "
        r"--optim.lr or --optim.clip; nothing was saved, because the run has no folder"
    )
    with pytest.raises(ValueError, match=words):
        train(network(), task, recipe(bad_steps=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(task):
    with pytest.raises(ValueError, match="device: expected a GPU that PyTorch sees, got none; use cpu"):
        train(network(), task, recipe(device="cuda"))


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

"""What goes wrong in a long run is told in a sentence: signals, memory, workers, disks."""

import os
import signal
import weakref

import pytest
import torch
from torch import nn

from sansmax.tasks._data.draws import Part
from sansmax.train import guard, parallel
from sansmax.train.guard import Interrupted, Signals, fitting_batch
from sansmax.train.loop import train
from small_task import digits, network, recipe


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_second_acts_as_before(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append("before"))
    try:
        with Signals() as signals:
            assert signals.name == ""
            os.kill(os.getpid(), number)
            assert signals.name == signal.Signals(number).name
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == ["before"]
        os.kill(os.getpid(), number)
        assert heard == ["before"] * 2
    finally:
        signal.signal(number, before)


def test_a_signal_during_an_evaluation_leaves_with_the_state(tmp_path):
    task = digits()
    batches = task.val_batches

    def interrupted(*arguments):
        yield from batches(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(*arguments)

    task.val_batches = interrupted
    words = f"^interrupted by SIGTERM: update 4 of 8 is saved in {tmp_path}, go on with --resume$"
    with pytest.raises(Interrupted, match=words):
        train(network(), task, recipe(), tmp_path)
    outcome = train(network(), digits(), recipe(resume=True), tmp_path)
    assert outcome.curve == train(network(), digits(), recipe()).curve


def test_a_signal_while_the_caller_looks_at_an_epoch_is_obeyed_after_the_next_update(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    words = f"^interrupted by SIGINT: update 5 of 8 is saved in {tmp_path}, go on with --resume$"
    with pytest.raises(Interrupted, match=words):
        train(network(), digits(), recipe(), tmp_path, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_folder_nothing_is_saved():
    with pytest.raises(
        Interrupted, match=r"^interrupted by SIGINT: nothing was saved, because the run has no"
    ):
        train(network(), digits(), recipe(), None, lambda *_: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize(
    ("fixed", "each", "capacity", "batch", "expected"),
    [
        (100.0, 10.0, 1000.0, 256, 80),  # 0.9 * 1000 = 100 + 10 b
        (0.0, 1.0, 1000.0, 256, 255),  # never the one that did not fit
        (950.0, 10.0, 1000.0, 256, 0),
        (100.0, 900.0, 1000.0, 1, 0),
        (100.0, 0.0, 1000.0, 64, 63),  # memory that does not grow
    ],
)
def test_the_batch_that_fits_by_hand(fixed, each, capacity, batch, expected):
    asked = []
    peak = lambda count: asked.append(count) or fixed + each * count  # noqa: E731
    assert fitting_batch(peak, capacity, batch) == expected
    assert asked == [max(1, batch // 16), 2 * max(1, batch // 16)]


def test_no_batch_fits_where_two_small_ones_do_not():
    def peak(count):
        raise torch.OutOfMemoryError("no")

    assert fitting_batch(peak, 1000.0, 64) == 0


class Full(nn.Module):
    """As if 20 images filled the GPU; in the forward or in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.kept = network(), []

    def forward(self, x):
        hidden = self.body(x)
        if len(x) > 20:
            self.kept.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
        return hidden


class FullBackward(Full):
    def forward(self, x):
        hidden = self.body(x)
        if len(x) > 20:
            self.kept.append(weakref.ref(hidden))
            hidden.register_hook(self.fail)
        return hidden

    def fail(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")


@pytest.mark.parametrize("kind", [Full, FullBackward])
def test_full_memory_of_a_gpu_is_told_with_what_would_fit(kind, monkeypatch, tmp_path):
    model, peaks = kind(), []

    class Properties:
        total_memory = 1000.0

    def peak():
        peaks.append([reference() for reference in model.kept])
        return 100.0 + 10.0 * [2, 4][len(peaks) - 1]

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    words = (
        "memory: expected a batch that fits on the GPU, got one that asked for 2.50 GiB too much; a batch of "
        "48 a process would fit by what two small ones took: raise --accumulate or lower --batch-size, or "
        f"add --checkpointing or --precision bf16; nothing was saved yet in {tmp_path}"
    )
    with pytest.raises(ValueError, match=words):
        train(model, digits(), recipe(), tmp_path)
    assert peaks == [[None], [None]]  # what the failed step had made is free again


def test_full_memory_without_an_estimate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(parallel, "fitting", lambda *_: 0)
    with pytest.raises(
        ValueError, match=r"too much; lower --batch-size or --img-size, raise --accumulate, or"
    ):
        train(Full(), digits(), recipe())


def test_no_estimate_for_pieces_too_small_to_halve():
    class Made:
        num_processes = 1

    for size in (1, 2, 3):
        assert parallel.fitting(network(), digits(), Made(), Part(size)) == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 12 bytes"), "memory: expected a batch that fits into memory, .* kept$"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "data.workers: expected processes that decode images to live, .* lower --data.workers .* kept$"),
        (torch.OutOfMemoryError("CUDA out of memory."), "asked for more too much; a batch of 6 a .*; kept$"),
    ],
)  # fmt: skip
def test_errors_become_sentences(error, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(ValueError, match=words), guard.in_words(lambda: "kept", lambda: 6):
        raise error


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2$"), guard.in_words(lambda: "", lambda: 0):
        raise RuntimeError("mat1 and mat2")


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fails(*_, **__):
        from torch._dynamo.exc import Unsupported

        raise Unsupported("no such operator")

    model = network()
    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(ValueError, match=r"compile: expected a network .*; leave --compile out; nothing was"):
        train(model, digits(), recipe())


def test_statistics_of_norms_alone_are_kept_and_restored():
    model = network(nn.BatchNorm1d(24))
    model.register_buffer("other", torch.zeros(3))
    kept = guard.NormBuffers(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(9, 64))
    model.other += 1
    assert model[2].num_batches_tracked == 1
    kept.restore()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == (name != "other")
    model(torch.randn(9, 64))
    kept.keep()
    kept.restore()
    assert model[2].num_batches_tracked == 1
    guard.NormBuffers(network()).restore()

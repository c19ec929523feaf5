"""A few digits and a few weights: a training run of milliseconds."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from sansmax.tasks._data import load_images
from sansmax.tasks._data.batches import InMemory
from sansmax.tasks.classification import Classification
from sansmax.train.guard import Interrupted
from sansmax.train.recipe import Augment, Optim, Recipe

PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, smoothing=0.0)


def digits(train: int = 200, val: int = 70, augment: Augment = PLAIN, kind=Classification, **words):
    """A task of so many digits."""
    images = load_images()
    part = replace(
        images,
        train_images=images.train_images[:train],
        train_labels=images.train_labels[:train],
        val_images=images.val_images[:val],
        val_labels=images.val_labels[:val],
    )
    return kind(InMemory(part, augment, torch.device("cpu")), augment, **words)


def network(*middle: nn.Module, classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    middle = middle or (nn.ReLU(),)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), *middle, nn.Linear(24, classes))


def recipe(optim: dict | None = None, **changes) -> Recipe:
    """Two epochs of four updates at a constant scale of the rate."""
    words = {"lr": 1e-2, "lr_batch": None, "per": "update", "warmup": 0.0, "min_lr": 0.0}
    given = {"epochs": 2, "batch_size": 50, "device": "cpu", "augment": PLAIN, "log_every": 1}
    return Recipe(optim=Optim(**words | (optim or {})), **given | changes)


@contextmanager
def interrupted(module, epoch, number):
    """Ctrl-C before that update of a run of the task, which must be reached."""
    opened = module.open_task

    def stopped(*given):
        task = opened(*given)
        original = task.train_batches

        def batches(at, update, part):
            for n, batch in enumerate(original(at, update, part), update):
                if (at, n) == (epoch, number):
                    raise KeyboardInterrupt
                yield batch

        task.train_batches = batches
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_task", stopped)
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            return
    raise AssertionError(f"update {number} of epoch {epoch} was not reached")

"""The training loop, from top to bottom: seeds, optimiser, schedule, epochs, evaluation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["Budget", "Outcome", "Task", "evaluate", "train"]


class Task(Protocol):
    """What the loop asks of a task (sansmax.tasks)."""

    score: str  # what the metric is called
    train_size: int
    val_size: int

    def train_batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...
    def val_batch(self, index: Tensor) -> tuple[Tensor, Tensor]: ...
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor: ...
    def metric(self) -> Metric: ...
    def predictions(self, outputs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Budget:
    """How long and how fast to learn; `batch_size` counts the images of all processes together."""

    epochs: int
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the updates over which the learning rate rises to lr, before the cosine
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """A finished run: score and predictions after the last epoch, and its history."""

    seed: int
    score: float
    train_seconds: float  # without evaluation
    images_per_s: float
    curve: list[dict[str, float]] = field(default_factory=list)  # epoch, mean training loss, score
    predictions: list[int] = field(default_factory=list)  # in the order of the held-out set


def train(
    model: nn.Module,
    task: Task,
    budget: Budget,
    on_epoch: Callable[[dict[str, float]], Any] | None = None,
) -> Outcome:
    """Trains `model` in place: AdamW, a linear warm-up, a cosine down to zero, an evaluation every epoch.

    The order of the images and their augmentation depend on the seed alone, so two models of one seed see the
    same batches. On one CPU with one number of threads a run repeats bit for bit.

    Raises:
        ValueError: the loss became NaN or infinite, or accelerate is bound to another device in this process.
    """
    accelerator = Accelerator(cpu=budget.device == "cpu")
    if accelerator.device.type != torch.device(budget.device).type:
        raise ValueError(
            f"train: expected device {budget.device!r}, but this process is bound to {accelerator.device}; "
            f"start a new process for another device"
        )
    set_seed(budget.seed)
    draws = torch.Generator().manual_seed(budget.seed)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=budget.lr, weight_decay=budget.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    batch_size = min(budget.batch_size, task.train_size)
    batches = task.train_size // batch_size
    updates = batches * budget.epochs
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(2, updates),
        warmup_t=round(budget.warmup * updates),
        warmup_lr_init=budget.lr / 100,
        t_in_epochs=False,
    )

    curve: list[dict[str, float]] = []
    score, predictions = math.nan, torch.empty(0)
    seconds, update = 0.0, 0
    for epoch in range(1, budget.epochs + 1):
        model.train()
        start = time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        order = torch.randperm(task.train_size, generator=draws)
        for index in order[: batches * batch_size].split(batch_size):
            schedule.step_update(update)
            share = index[accelerator.process_index :: accelerator.num_processes]
            inputs, targets = task.train_batch(share, draws)
            loss = task.loss(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), budget.clip)
            optimizer.step()
            total += loss.detach()
            update += 1
        mean_loss = float(total) / batches  # waits for the device
        seconds += time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"the training loss became {mean_loss} in epoch {epoch} of {budget.epochs} "
                f"(lr {budget.lr:g}, seed {budget.seed}); expected a finite one, lower the learning rate"
            )
        score, predictions = evaluate(model, task)
        curve.append({"epoch": epoch, "loss": mean_loss, task.score: score})
        if on_epoch is not None:
            on_epoch(curve[-1])
    return Outcome(
        seed=budget.seed,
        score=score,
        train_seconds=seconds,
        images_per_s=updates * batch_size / seconds,
        curve=curve,
        predictions=predictions.tolist(),
    )


@torch.inference_mode()
def evaluate(model: nn.Module, task: Task, batch_size: int = 256) -> tuple[float, Tensor]:
    """Score and predictions on the held-out set; every process evaluates all of it."""
    model.eval()
    metric = task.metric()
    predictions = []
    for index in torch.arange(task.val_size).split(batch_size):
        inputs, targets = task.val_batch(index)
        outputs = model(inputs)
        metric.update(outputs, targets)
        predictions.append(task.predictions(outputs).cpu())
    return float(metric.compute()), torch.cat(predictions)

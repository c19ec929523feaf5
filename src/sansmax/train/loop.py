"""The training loop, from top to bottom: device, network, optimiser, state, updates, evaluation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from ..tasks._data.draws import draw
from ..tasks._task import Task
from . import optim, parallel
from .guard import NormBuffers, Signals, in_words, interrupted, not_finite
from .log import Log
from .recipe import Run
from .state import Keeper
from .verdicts import evaluate

__all__ = ["Outcome", "curve_name", "train"]


@dataclass(frozen=True)
class Outcome:
    """A finished run: verdicts of the last evaluation, and its history."""

    seed: int
    score: float  # the task's, of the last evaluation
    train_seconds: float  # without evaluation
    images_per_s: float  # or clouds, sequences: whatever the task counts
    curve: list[dict[str, float]]  # epoch, mean training loss, the task's scores (their loss as val_loss)
    verdicts: Tensor  # see the task's `verdict`, in the order of the held-out set
    skipped: int  # updates without a step, because a number was not finite
    network: nn.Module  # what was evaluated: the weights, or their average
    words: str  # the figures of the last evaluation and the speed

    @property
    def predictions(self) -> list[int]:
        """Of a classification: the most probable class of each held-out image."""
        return self.verdicts[:, 4].long().tolist()


def train(
    model: nn.Module,
    task: Task,
    recipe: Run,
    folder: Path | None = None,
    on_epoch: Callable[[dict[str, float], nn.Module, Tensor], Any] | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains `model` in place and evaluates it after every epoch.

    Every random choice follows from the seed and the number of the update, so a run that was killed and
    goes on from a state in `folder`/states repeats the losses of one that was not: bit for bit on a CPU
    with the same number of processes and threads. With another number only dropout and drop-path draw
    otherwise.

    Args:
        folder: of metrics.jsonl and states, or None for neither.
        on_epoch: called by every process with the new point of the curve, the evaluated network and its
            verdicts.

    Raises:
        ValueError: a setting does not fit, memory is full, a data worker died, or recipe.bad_steps updates
            in a row
            had a loss or gradient that is not finite; the text says what is saved.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    made = parallel.accelerator(recipe)
    part = parallel.part(recipe, made, task.train_size)
    recipe = replace(recipe, batch_size=part.batch_size)  # of a small set; the rate goes with it
    epoch_updates = task.train_size // part.batch_size
    total = epoch_updates * recipe.epochs
    model, average = parallel.placed(model, recipe, made)
    optimizer = made.prepare(optim.optimizer(model, recipe))
    schedule = optim.schedule(optimizer.optimizer, recipe, epoch_updates)
    network = model if recipe.parallel == "fsdp" else made.prepare(model)
    # Not DDP's copy, which exchanges buffers at every forward pass: processes may have unequally many.
    evaluated = average.module if average and recipe.optim.evaluate_ema else model
    norms = NormBuffers(model)
    keeper = Keeper(recipe, folder, made, network, optimizer.optimizer, average)
    console = console if console and made.is_main_process else Console(quiet=True)
    at = keeper.load(console)
    norms.keep()

    def scored() -> Tensor:
        # Four pieces without activations take less memory than one with them.
        return evaluate(evaluated, task, made, min(256, 4 * part.piece), leave)

    def leave() -> None:
        if signals.name and made.num_processes == 1:
            raise interrupted(signals.name, keeper.words(total))

    verdicts = None
    with (
        Signals() as signals,
        Log(recipe, folder if made.is_main_process else None, console, total, at) as log,
        in_words(lambda: keeper.words(total), lambda: parallel.fitting(network, task, made, part), task.unit),
    ):
        while True:
            epoch = at.update // epoch_updates
            if at.update % epoch_updates == 0 and at.evaluated < epoch:
                keeper.save(at)  # first: an evaluation can be repeated
                started = time.perf_counter()
                verdicts = scored()
                found = task.scores(verdicts)
                at.curve.append(
                    {
                        "epoch": epoch,
                        "loss": at.epoch_loss / max(1, at.epoch_good),
                        **{curve_name(k): v for k, v in found.items()},
                    }
                )
                at.evaluated, at.epoch_loss, at.epoch_good = epoch, 0.0, 0
                took = time.perf_counter() - started
                log.line(
                    "eval", update=at.update, epoch=epoch, **found, seconds=at.seconds, eval_seconds=took
                )
                if on_epoch is not None:
                    on_epoch(at.curve[-1], evaluated, verdicts)
            if at.update == total:
                break
            network.train()
            batches = task.train_batches(epoch, at.update % epoch_updates, part)
            for _ in range(at.update % epoch_updates, epoch_updates):
                started, waited, loss = time.perf_counter(), 0.0, torch.zeros((), device=made.device)
                schedule.step(
                    at.update - at.update % recipe.optim.hold if recipe.optim.per == "update" else epoch
                )
                for micro in range(recipe.accumulate):
                    clock = time.perf_counter()
                    inputs, targets = next(batches)
                    waited += time.perf_counter() - clock
                    torch.manual_seed(draw(recipe.seed, "step", at.update, micro, made.process_index))
                    with parallel.last_backward(network, made, micro == recipe.accumulate - 1):
                        loss += _learned(network, task, made, inputs, targets, recipe.accumulate)
                norm = made.clip_grad_norm_(network.parameters(), recipe.optim.clip or float("inf"))
                mean_loss, norm, asked = parallel.agreed(made, loss, norm, bool(signals.name))
                good = math.isfinite(mean_loss + norm)
                if good:
                    optimizer.step()
                elif made.scaler is not None:
                    made.scaler.update()  # a lower scale
                optimizer.zero_grad()
                norms.keep() if good else norms.restore()
                if good and average:
                    average.update(model)
                at.add(mean_loss, good, waited, time.perf_counter() - started)
                log.advance(at.update)
                if at.update % recipe.log_every == 0:
                    rate = max(g["lr"] / max(1, g.get("lr_scale", 1)) for g in optimizer.param_groups)
                    now = {"update": at.update, "epoch": at.update / epoch_updates, "lr": rate}
                    log.line(
                        "train",
                        **now,
                        grad_norm=norm if good else None,
                        **at.told(part.batch_size, task.unit),
                    )
                if at.bad >= recipe.bad_steps or (at.update % epoch_updates == 0 and not at.epoch_good):
                    raise not_finite(
                        recipe, at.bad, f"{at.update} of {total}", mean_loss, norm, keeper.words(total)
                    )
                if asked:
                    keeper.save(at)
                    raise interrupted(signals.name or "SIGTERM elsewhere", keeper.words(total))
                if recipe.save_every and at.update % recipe.save_every == 0:
                    keeper.save(at)
        if verdicts is None:  # the run had been finished
            verdicts = scored()
    found, speed = task.scores(verdicts), at.update * part.batch_size / at.seconds
    words = f"{task.words(found)}, {speed:,.0f} {task.unit}/s"
    score = found[task.score]
    return Outcome(recipe.seed, score, at.seconds, speed, at.curve, verdicts, at.skipped, evaluated, words)


def _learned(
    network: nn.Module, task: Task, made: Accelerator, inputs: Any, targets: Any, pieces: int
) -> Tensor:
    """Forward and backward of one of the pieces of an update; its share of the loss.

    Its variables hold the activations, and go with it when memory is full.
    """
    with made.autocast():
        outputs = network(inputs)
    loss = task.loss(outputs, targets) / pieces
    made.backward(loss)
    return loss.detach()


def curve_name(score: str) -> str:
    """Of a score in the curve, where `loss` is the training's."""
    return "val_loss" if score == "loss" else score

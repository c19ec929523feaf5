"""Optimiser, schedule and moving average of a run, from timm."""

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers  # pyright: ignore
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from .._find import pick
from .recipe import Run

__all__ = ["average", "optimizer", "schedule"]

SCHEDULES = ("cosine", "multistep", "poly", "rsqrt", "step", "tanh")
# They need a package or a GPU, second derivatives, or keep what a saved state does not hold.
UNFIT = ["bnb*", "fused*", "adahessian", "*adafactorbv*", "madgrad*", "kron*"]
POLY_POWER = 0.9  # timm's own is the 0.1 of sched="step"
STEP_EPOCHS = 90  # of sched="step", in which the rate falls to a tenth; timm's


def optimizer(model: nn.Module, recipe: Run) -> torch.optim.Optimizer:
    """timm's, with no decay of vectors and of what model.no_weight_decay() names, and rates that fall with
    depth where layer_decay is given (model.group_matcher()).

    A network with parameter_groups(weight_decay) has its own: of each group params, weight_decay and
    lr_scale, by which the rate is multiplied.

    Raises:
        ValueError: timm has no such optimiser, it does not take the settings, or the network has no groups
            of layers, or groups of its own.
    """
    wanted = recipe.optim
    name = pick("optimisers", wanted.opt, map(str, list_optimizers(exclude_filters=UNFIT)))
    if wanted.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"optim.layer_decay: expected a network with group_matcher(), got {recipe.model}, which has "
            "none; leave it out"
        )
    groups: Any = getattr(model, "parameter_groups", None)
    if wanted.layer_decay is not None and groups is not None:
        raise ValueError(
            f"optim.layer_decay: expected none with {recipe.model}, which has rates of its own, got "
            f"{wanted.layer_decay:g}; leave it out"
        )
    known = get_optimizer_info(name)
    if wanted.betas and not known.has_betas:
        raise ValueError(
            f"optim.betas: expected none with {name}, which has no such setting, got {wanted.betas}; leave "
            "it out"
        )
    words: dict[str, Any] = {"betas": wanted.betas} if wanted.betas else {}
    if name in ("adam", "adamw"):
        words["fused"] = True
    if known.has_momentum:
        words["momentum"] = wanted.momentum
    try:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=recipe.lr(),
            weight_decay=wanted.weight_decay,
            layer_decay=wanted.layer_decay,
            param_group_fn=groups and (lambda _: groups(wanted.weight_decay)),
            **words,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optim.opt: expected settings that {name} takes, got {' '.join(str(error).split())!r}; check "
            "optim.betas, optim.momentum and optim.weight_decay"
        ) from None


def schedule(optimizer: torch.optim.Optimizer, recipe: Run, updates: int) -> Scheduler:
    """The learning rate over time; `updates` counts those of an epoch.

    With per="epoch" epoch e, counted from 0, runs at f(e) throughout: a line from warmup_lr at 0 to the
    full rate at `warmup`, then the curve over `epochs` to min_lr, of which the warm-up hides the beginning.
    With per="update" the same, over updates. sched="rsqrt" has no end and no least rate: see InverseRoot.
    """
    wanted = recipe.optim
    known = pick("schedules", wanted.sched, SCHEDULES)
    per_epoch = wanted.per == "epoch"
    unit = 1 if per_epoch else updates
    if known == "rsqrt":
        return InverseRoot(optimizer, max(1, round(wanted.warmup * unit)))
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=known,
        num_epochs=recipe.epochs if per_epoch else max(2, recipe.epochs * updates),
        warmup_epochs=round(wanted.warmup * unit),
        decay_epochs=STEP_EPOCHS * unit,
        decay_milestones=[epoch * unit + 1 for epoch in wanted.milestones],  # timm's fall one before theirs
        decay_rate=POLY_POWER if known == "poly" else 0.1,
        warmup_lr=wanted.warmup_lr,
        min_lr=wanted.min_lr,
        step_on_epochs=True,
    )
    assert scheduler is not None
    return scheduler


class InverseRoot(Scheduler):
    """The rate times min(t / warmup, sqrt(warmup / t)), t counted from 1 (Vaswani et al., 2017, section
    5.3)."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int) -> None:
        super().__init__(optimizer, "lr")
        self.warmup = warmup

    def _get_lr(self, t: int) -> list[float]:
        share = min((t + 1) / self.warmup, math.sqrt(self.warmup / (t + 1)))
        return [value * share for value in self.base_values]


def average(model: nn.Module, recipe: Run) -> ModelEmaV3 | None:
    """The exponential moving average of the weights, a <- d a + (1 - d) w after every update (timm's), of
    buffers too; None where the recipe wants none."""
    return ModelEmaV3(model, decay=recipe.optim.ema) if recipe.optim.ema else None

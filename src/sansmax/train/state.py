"""The whole state of a run: where it stands, weights, optimiser, average and loss scale."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from . import parallel
from .checkpoint import States
from .recipe import Run

__all__ = ["Keeper", "Position"]


@dataclass
class Position:
    """Where a run stands. Random choices need no state: they follow from the seed and the number of the
    update."""

    update: int = 0
    evaluated: int = 0  # epochs
    skipped: int = 0  # updates without a step, because a number was not finite
    bad: int = 0  # the last of them in a row
    seconds: float = 0.0  # of training, without evaluation
    epoch_loss: float = 0.0  # sum over the updates of this epoch
    epoch_good: int = 0  # how many they are
    line: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "good", "all", "wait", "time"), 0.0)
    )
    curve: list[dict[str, float]] = field(default_factory=list)
    processes: int = 1

    def add(self, loss: float, good: bool, wait: float, time: float) -> None:
        """One more update."""
        self.update += 1
        self.seconds += time
        for name, value in (("all", 1.0), ("wait", wait), ("time", time)):
            self.line[name] += value
        if good:
            self.bad, self.epoch_good, self.epoch_loss = 0, self.epoch_good + 1, self.epoch_loss + loss
            self.line["loss"] += loss
            self.line["good"] += 1
        else:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1

    def told(self, samples: int, unit: str) -> dict[str, float | None]:
        """Means since the last call, of updates of so many samples."""
        line, self.line = self.line, dict.fromkeys(self.line, 0.0)
        return {
            "loss": line["loss"] / line["good"] if line["good"] else None,
            f"{unit}_per_s": line["all"] * samples / line["time"],
            "data_wait": line["wait"] / line["time"],
            "seconds": self.seconds,
            "skipped_steps": self.skipped,
        }


@dataclass
class Keeper:
    """Saves and loads the state of a run; without a folder it keeps nothing."""

    recipe: Run
    folder: Path | None
    made: Accelerator
    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None

    def __post_init__(self) -> None:
        self._states = States(self.folder / "states", self.recipe.keep) if self.folder else None
        if self._states and not self.recipe.resume and self._states.paths():
            raise ValueError(
                f"out: expected a new folder, got {self.folder} with states of a run in it; add --resume to "
                "go on with it, or name another folder with --out"
            )
        self.saved = 0 if self.folder else None  # the update of the newest state

    def save(self, at: Position) -> None:
        """Writes the state, unless this one is there already (collective)."""
        if self._states is None or (self.saved == at.update and at.update):
            return
        state = {
            "position": asdict(at),
            **parallel.states(self.network, self.optimizer),
            "average": parallel.weights(self.average.module) if self.average else None,
            "scaler": self.made.scaler.state_dict() if self.made.scaler is not None else None,
        }
        if self.made.is_main_process:
            self._states.save(at.update, state)
        self.made.wait_for_everyone()
        self.saved = at.update

    def load(self, console: Console) -> Position:
        """The newest state into the network, the optimiser and the average; the beginning where there is none
        (collective).

        Args:
            console: where another number of processes is told.

        Raises:
            ValueError: no state can be read, or it belongs to another network.
        """
        state = self._states.newest() if self._states and self.recipe.resume else None
        if state is None:
            return Position(processes=self.made.num_processes)
        try:
            parallel.load_states(self.network, self.optimizer, state)
            if self.average:
                parallel.load_states(self.average.module, None, {"model": state["average"]})
            if self.made.scaler is not None and state["scaler"]:
                self.made.scaler.load_state_dict(state["scaler"])
            at = Position(**state["position"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"resume: expected the state of this network and optimiser in {self.folder}, got "
                f"{' '.join(str(error).split())[:200]}; use the recipe with which the run was begun"
            ) from None
        self.saved = at.update
        if at.processes != self.made.num_processes:
            console.print(
                f"going on with {self.made.num_processes} processes after {at.processes}: the same samples "
                "in the same updates, but other masks of dropout and drop-path and other rounding; shards "
                "are dealt out anew"
            )
            at.processes = self.made.num_processes
        return at

    def words(self, total: int) -> str:
        """What is saved, and how to go on."""
        if self.saved is None:
            return "nothing was saved, because the run has no folder"
        if not self.saved:
            return f"nothing was saved yet in {self.folder}"
        return f"update {self.saved} of {total} is saved in {self.folder}, go on with --resume"

"""A run, written down: what a network learns, for how long, and how. What is common to all tasks."""

import dataclasses
import json
import math
import shlex
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

__all__ = ["Optim", "Run", "Words", "at_least", "at_least_0", "positive", "shares"]

Words = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: json.loads(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclass(frozen=True)
class Optim:
    """How weights change."""

    opt: str = "adamw"
    """Any of timm.optim.list_optimizers() that needs no further package and no second derivatives."""
    lr: float = 5e-4
    """Highest learning rate, for lr_batch images an update."""
    lr_batch: int | None = 512
    """The learning rate is lr * batch_size / lr_batch; None: lr as it is."""
    weight_decay: float = 0.05
    """Not of biases, of other vectors, and of what the network lists in no_weight_decay()."""
    betas: tuple[float, float] | None = None
    """Of optimisers that have them; None: their own."""
    momentum: float = 0.9
    """Of optimisers that have one."""
    clip: float | None = None
    """Largest norm of all gradients together; None: no clipping."""
    sched: str = "cosine"
    """cosine, poly (power 0.9), tanh, step (a tenth every 90 epochs), multistep (a tenth at every milestone),
    as timm's, or rsqrt (falls with 1 / sqrt(t))."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the rate falls with sched="multistep"."""
    per: Literal["epoch", "update"] = "epoch"
    """Whether the rate stands still during an epoch, as in the papers' code, or changes at every update."""
    hold: int = 1
    """Updates over which the rate stands still with per="update"."""
    warmup: float = 5
    """Epochs over which the rate rises from warmup_lr; below 1 with per="update"."""
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    layer_decay: float | None = None
    """Factor of the rate from a layer to the one below it."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0: none."""
    evaluate_ema: bool = True
    """Whether the average is what is evaluated and kept, or the weights themselves."""


@dataclass(frozen=True)
class Run:
    """One run of `sansmax train`; every field is a flag. A task's file has its own, with its data."""

    task: ClassVar[str]
    """The file of sansmax.tasks."""
    evaluated: ClassVar[tuple[str, ...]] = ("data", "batch_size", "device", "precision")
    """The fields that `sansmax eval` has flags for."""

    model: str = "vit_mini"
    """A name of timm or sansmax (`sansmax list`, timm.list_models())."""
    mechanism: str | None = None
    """In place of the network's own attention; None: its own."""
    model_args: Words = field(default_factory=dict)
    """Further words for the network's constructor, as JSON."""
    weights: str = ""
    """Weights to begin with: a checkpoint, a run folder, or pretrained; empty: random ones. A run that goes
    on has its own."""
    drop_path: float = 0.0
    epochs: int = 300
    batch_size: int = 1024
    """Samples of one update, over all processes and accumulated batches."""
    accumulate: int = 1
    """Backward passes of one update."""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: copies of the network, or one that is shared out among them (FSDP2)."""
    compile: bool = False
    channels_last: bool = False
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    optim: Optim = field(default_factory=Optim)
    out: str = "sansmax-run"
    """The run's folder."""
    resume: bool = False
    """Go on with the run in that folder, exactly where it stood."""
    save_every: int | None = 1000
    """Updates between two saved states, besides the one after every epoch; None: after epochs alone."""
    keep: int = 2
    """How many of the last states are kept, besides the best weights."""
    log_every: int = 10
    """Updates between two lines of metrics.jsonl."""
    bad_steps: int = 20
    """Stop after so many updates in a row whose loss or gradient is not finite."""
    tensorboard: bool = False
    wandb: str = ""
    """Project of Weights & Biases; empty: none."""

    @property
    def paired(self) -> bool:
        """Whether samples of an update change each other two by two, so that it must hold pairs."""
        return False

    @property
    def partial(self) -> bool:
        """Whether some weights rest in some updates, which copies of the network must then look for."""
        return False

    def lr(self) -> float:
        """The highest learning rate at this batch size."""
        share = self.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1
        return self.optim.lr * share

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` turns them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """A recipe from `to_json`; fields that are missing have their defaults, unknown ones are refused."""
        hints = typing.get_type_hints(cls)
        parts = {k: hints[k] for k in values if dataclasses.is_dataclass(hints.get(k))}
        return _filled(cls, {k: _filled(parts[k], v) if k in parts else v for k, v in values.items()})

    def command(self, name: str | None = None, base: "Run | None" = None) -> str:
        """The command line that gives this recipe, starting from the recipe `name`, which is `base`."""
        words = ["sansmax", "train", *([name] if name else [])]
        for flag, value, default in _differences(self, base or type(self)()):
            if isinstance(value, bool) and isinstance(default, bool):
                words.append(flag if value else flag[:2] + ".".join(_no(flag[2:].split("."))))
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            else:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
        return shlex.join(words)

    def checked(self) -> Self:
        """Itself, if every field can be right.

        Raises:
            ValueError: a field is out of range or does not go with another; one sentence says what to do.
        """
        o = self.optim
        at_least(
            1,
            {"optim.hold": o.hold},
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            save_every=self.save_every,
            keep=self.keep,
            log_every=self.log_every,
            bad_steps=self.bad_steps,
        )
        at_least(0, seed=self.seed)
        shares({"drop_path": self.drop_path, "optim.ema": o.ema})
        positive({f"optim.{k}": getattr(o, k) for k in ("lr", "clip", "lr_batch", "layer_decay")})
        at_least_0({f"optim.{k}": getattr(o, k) for k in ("weight_decay", "warmup", "warmup_lr", "min_lr")})
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch size {self.batch_size}, got {self.accumulate}; "
                f"change one of them"
            )
        if o.warmup and not float(o.warmup).is_integer() and o.per == "epoch":
            raise ValueError(
                f"optim.warmup: expected whole epochs with optim.per epoch, got {o.warmup:g}; use "
                "optim.per update"
            )
        if bool(o.milestones) != (o.sched == "multistep") or list(o.milestones) != sorted({*o.milestones}):
            raise ValueError(
                "optim.milestones: expected rising epochs with optim.sched multistep, none with others, got "
                f"{o.milestones} with {o.sched}; use 8 11 for example"
            )
        parts = {f"{name}.": part for name, part in vars(self).items() if dataclasses.is_dataclass(part)}
        for prefix, part in {"": self, **parts}.items():
            for name, kind in typing.get_type_hints(type(part)).items():
                known = ", ".join(map(str, typing.get_args(kind)))
                value = getattr(part, name)
                if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
                    raise ValueError(f"{prefix}{name}: expected one of {known}, got {value!r}")
        if not isinstance(self.model_args, dict):
            raise ValueError(
                f"""model_args: expected a JSON object such as '{{"depth": 6}}', got {self.model_args!r}"""
            )
        return self


def at_least(least: int, fields: dict[str, int | None] | None = None, **more: int | None) -> None:
    """ValueError for the first of these whole numbers that is less; None passes."""
    for name, value in ((fields or {}) | more).items():
        if value is not None and value < least:
            raise ValueError(
                f"{name}: expected a whole number of at least {least}, got {value}; leave it out if unsure"
            )


def shares(fields: dict[str, float]) -> None:
    """ValueError for the first that is not within 0 to 1."""
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {value:g}; leave it out if unsure")


def positive(fields: dict[str, float | None]) -> None:
    """ValueError for the first that is not finite or not above 0; None passes."""
    for name, value in fields.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a number above 0, got {value:g}; leave it out if unsure")


def at_least_0(fields: dict[str, float]) -> None:
    """ValueError for the first that is not finite or below 0."""
    for name, value in fields.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"{name}: expected a number of at least 0, got {value:g}; leave it out if unsure"
            )


def _filled(cls: Any, values: dict[str, Any]) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if odd := sorted(set(values) - set(known)):
        raise ValueError(
            f"recipe: expected fields of this version, got {', '.join(odd)}; use the version that wrote it"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _differences(recipe: Any, base: Any, prefix: str = "--") -> list[tuple[str, Any, Any]]:
    found = []
    for f in dataclasses.fields(recipe):
        value, default = getattr(recipe, f.name), getattr(base, f.name)
        flag = f"{prefix}{f.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            found += _differences(value, default, f"{flag}.")
        elif value != default:
            found.append((flag, value, default))
    return found


def _no(path: list[str]) -> list[str]:
    return [*path[:-1], f"no-{path[-1]}"]

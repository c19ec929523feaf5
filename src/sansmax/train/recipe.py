"""A run, written down: which network learns what from which images, for how long, and how."""

import dataclasses
import json
import math
import shlex
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import tyro

from ..tasks._data.settings import Augment, Data

__all__ = ["Augment", "Data", "Distil", "Optim", "Recipe"]

INTERPOLATIONS = ("bilinear", "bicubic", "random")

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
    """cosine, poly, tanh, or step (a tenth every 90 epochs), as timm's."""
    per: Literal["epoch", "update"] = "epoch"
    """Whether the rate stands still during an epoch, as in the papers' code, or changes at every update."""
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
class Distil:
    """Learning from a teacher too (DeiT, https://arxiv.org/abs/2012.12877)."""

    teacher: str = ""
    """A name of timm, a run folder, or name=checkpoint; empty: none."""
    kind: Literal["soft", "hard"] = "hard"
    alpha: float = 0.5
    """Weight of the teacher; the labels have the rest."""
    tau: float = 1.0
    """Temperature of kind="soft"."""


@dataclass(frozen=True)
class Recipe:
    """One run of `sansmax train`; every field is a flag. Functions of sansmax.recipes return one."""

    model: str = "vit_mini"
    """A name of timm or sansmax (`sansmax list`, timm.list_models())."""
    mechanism: str | None = None
    """In place of the network's own attention; None: its own."""
    model_args: Words = field(default_factory=dict)
    """Further words for the network's constructor, as JSON."""
    weights: str = ""
    """Weights to begin with: a checkpoint, a run folder, or pretrained; empty: random ones. A run that goes
    on has its own."""
    img_size: int | None = None
    """Side of the images; None: as the network was published, or as they are in a set held in memory."""
    eval_crop: float = 0.875
    """Share of the resized side that is kept for evaluation; 1: full crop."""
    drop_path: float = 0.0
    epochs: int = 300
    batch_size: int = 1024
    """Images of one update, over all processes and accumulated batches."""
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
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    distil: Distil = field(default_factory=Distil)
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
        parts = {"data": Data, "augment": Augment, "optim": Optim, "distil": Distil}
        return _filled(cls, {k: _filled(parts[k], v) if k in parts else v for k, v in values.items()})

    def command(self, name: str | None = None, base: "Recipe | None" = None) -> str:
        """The command line that gives this recipe, starting from the recipe `name`, which is `base`."""
        words = ["sansmax", "train", *([name] if name else [])]
        for flag, value, default in _differences(self, base or Recipe()):
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
        o, a, d = self.optim, self.augment, self.data
        for name, value, least in [
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("accumulate", self.accumulate, 1),
            ("img_size", self.img_size, 1),
            ("save_every", self.save_every, 1),
            ("keep", self.keep, 1),
            ("log_every", self.log_every, 1),
            ("bad_steps", self.bad_steps, 1),
            ("seed", self.seed, 0),
            ("augment.repeats", a.repeats, 1),
            ("data.num_samples", d.num_samples, 1),
            ("data.num_classes", d.num_classes, 1),
            ("data.workers", d.workers, 0),
            ("data.shuffle_buffer", d.shuffle_buffer, 1),
        ]:
            if value is not None and value < least:
                raise ValueError(
                    f"{name}: expected a whole number of at least {least}, got {value}; leave it out if "
                    "unsure"
                )
        for name, value in [
            ("drop_path", self.drop_path),
            ("eval_crop", self.eval_crop),
            ("augment.hflip", a.hflip),
            ("augment.reprob", a.reprob),
            ("augment.mix_prob", a.mix_prob),
            ("augment.mix_switch", a.mix_switch),
            ("augment.smoothing", a.smoothing),
            ("optim.ema", o.ema),
            ("distil.alpha", self.distil.alpha),
        ]:
            if not 0 <= value <= 1:
                raise ValueError(
                    f"{name}: expected a share from 0 to 1, got {value:g}; leave it out if unsure"
                )
        for name, value in [
            ("optim.lr", o.lr),
            ("optim.clip", o.clip),
            ("optim.lr_batch", o.lr_batch),
            ("optim.layer_decay", o.layer_decay),
            ("eval_crop", self.eval_crop),
            ("distil.tau", self.distil.tau),
        ]:
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a number above 0, got {value:g}; leave it out if unsure")
        for name, value in [
            ("optim.weight_decay", o.weight_decay),
            ("optim.warmup", o.warmup),
            ("optim.warmup_lr", o.warmup_lr),
            ("optim.min_lr", o.min_lr),
            ("augment.mixup", a.mixup),
            ("augment.cutmix", a.cutmix),
            ("augment.color_jitter", a.color_jitter),
            ("augment.shift", a.shift),
        ]:
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(
                    f"{name}: expected a number of at least 0, got {value:g}; leave it out if unsure"
                )
        if not 0 < a.scale[0] <= a.scale[1] <= 1:
            raise ValueError(
                f"augment.scale: expected two rising shares of the area above 0, got {a.scale}; use 0.08 1"
            )
        if not 0 < a.ratio[0] <= a.ratio[1]:
            raise ValueError(
                f"augment.ratio: expected two rising numbers above 0, got {a.ratio}; use 0.75 1.33"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch size {self.batch_size}, got {self.accumulate}; "
                f"change one of them"
            )
        if (a.mixup or a.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"batch_size: expected an even number, because mixup and cutmix pair images, got "
                f"{self.batch_size}; change it or set both to 0"
            )
        if o.warmup and not float(o.warmup).is_integer() and o.per == "epoch":
            raise ValueError(
                f"optim.warmup: expected whole epochs with optim.per epoch, got {o.warmup:g}; use "
                "optim.per update"
            )
        for part, prefix in [(self, ""), (o, "optim."), (self.distil, "distil.")]:
            for name, kind in typing.get_type_hints(type(part)).items():
                known, value = typing.get_args(kind), getattr(part, name)
                if typing.get_origin(kind) is Literal and value not in known:
                    raise ValueError(f"{prefix}{name}: expected one of {', '.join(known)}, got {value!r}")
        if a.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"augment.interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {a.interpolation!r}"
            )
        if not isinstance(self.model_args, dict):
            raise ValueError(
                f"""model_args: expected a JSON object such as '{{"depth": 6}}', got {self.model_args!r}"""
            )
        return self


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

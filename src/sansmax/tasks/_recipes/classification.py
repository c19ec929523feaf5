"""A run of image classification."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from .._data.settings import Augment, Data
from .._run import Run, at_least, at_least_0, positive, shares

__all__ = ["Distil", "Recipe"]

INTERPOLATIONS = ("bilinear", "bicubic", "random")


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
    features: float = 0.0
    """Weight of the squared distance to what the teacher's classifier is given, as a share of its spread."""


@dataclass(frozen=True)
class Recipe(Run):
    """One run of `sansmax train`; every field is a flag. Functions of sansmax.recipes return one."""

    task: ClassVar[str] = "classification"

    img_size: int | None = None
    """Side of the images; None: as the network was published, or as they are in a set held in memory."""
    eval_crop: float = 0.875
    """Share of the resized side that is kept for evaluation; 1: full crop."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    distil: Distil = field(default_factory=Distil)

    @property
    def paired(self) -> bool:
        return bool(self.augment.mixup or self.augment.cutmix)

    def checked(self) -> Self:
        a, d = self.augment, self.data
        at_least(
            1,
            {f"data.{k}": getattr(d, k) for k in ("num_samples", "num_classes", "shuffle_buffer")},
            img_size=self.img_size,
            **{"augment.repeats": a.repeats},
        )
        at_least(0, {"data.workers": d.workers})
        shares(
            {"eval_crop": self.eval_crop, "distil.alpha": self.distil.alpha}
            | {
                f"augment.{k}": getattr(a, k)
                for k in ("hflip", "reprob", "mix_prob", "mix_switch", "smoothing")
            }
        )
        positive({"eval_crop": self.eval_crop, "distil.tau": self.distil.tau})
        at_least_0({f"augment.{k}": getattr(a, k) for k in ("mixup", "cutmix", "color_jitter", "shift")})
        at_least_0({"distil.features": self.distil.features})
        if not 0 < a.scale[0] <= a.scale[1] <= 1:
            raise ValueError(
                f"augment.scale: expected two rising shares of the area above 0, got {a.scale}; use 0.08 1"
            )
        if not 0 < a.ratio[0] <= a.ratio[1]:
            raise ValueError(
                f"augment.ratio: expected two rising numbers above 0, got {a.ratio}; use 0.75 1.33"
            )
        if self.paired and self.batch_size % 2:
            raise ValueError(
                f"batch_size: expected an even number, because mixup and cutmix pair images, got "
                f"{self.batch_size}; change it or set both to 0"
            )
        if a.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"augment.interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {a.interpolation!r}"
            )
        return super().checked()

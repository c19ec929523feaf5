"""A run that tells what a point cloud is, or what each of its points belongs to."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from .._run import Run, at_least, at_least_0, shares

__all__ = ["PointAugment", "PointData", "Recipe"]


@dataclass(frozen=True)
class PointData:
    """Where the clouds come from. Each is centred on the mean of its points and scaled into the unit ball."""

    root: str = "solids"
    """solids (surfaces that are generated, with noise), a folder or an .npz file; docs/points.md lists the
    layouts: ModelNet40 as HDF5 or .off, ShapeNet part as text or HDF5, class folders of .ply, .off, .npy,
    .npz, .txt or .xyz."""
    split: Literal["train", "trainval"] = "train"
    """What is learned: trainval takes the validation split too, where there is one."""
    val_split: Literal["test", "val"] = "test"
    """What is held out; of a set without splits, a fifth of every class."""
    train_clouds: int | None = None
    """Learn from the first so many of a fixed shuffle; None: all."""
    val_clouds: int | None = None
    """Hold out the first so many of a fixed shuffle; None: all."""


@dataclass(frozen=True)
class PointAugment:
    """How a training cloud is changed, in the order of these fields."""

    order: Literal["random", "first"] = "random"
    """Which points of a cloud that has more are taken: other ones in every epoch, or the first of the file
    (as published for ModelNet40 in HDF5). Held-out clouds: one random choice that stays, or the first."""
    dropout: float = 0.875
    """Highest share of points that are dropped: the share is drawn for every cloud between 0 and this, and
    dropped points become copies of the first one, as in the published pipeline."""
    rotation: Literal["none", "z", "so3"] = "none"
    """z: by any angle about the up axis, as papers call it whichever axis is up; so3: any rotation."""
    up: Literal["x", "y", "z"] = "y"
    """The up axis: y in ModelNet40's HDF5 and in ShapeNet, z in ModelNet's .off files and in solids."""
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    """Lowest and highest factor, drawn for each axis alone."""
    translate: float = 0.2
    """Largest shift along each axis."""
    jitter: float = 0.0
    """Standard deviation of the noise of every coordinate."""
    clip: float = 0.02
    """Largest noise."""


@dataclass(frozen=True)
class Recipe(Run):
    """A network on point clouds: one class for each (kind classification), or for each of its points, where
    the shape's class is known (kind parts)."""

    task: ClassVar[str] = "points"
    evaluated: ClassVar[tuple[str, ...]] = (
        "data",
        "points",
        "votes",
        "batch_size",
        "device",
        "precision",
    )

    kind: Literal["classification", "parts"] = "classification"
    model: str = "pct_ea_cls"
    """pct_ea_cls or pct_cls; for parts pct_ea_partseg or pct_partseg."""
    points: int = 1024
    """Of a cloud that the network sees. Clouds with fewer are padded, which changes no result."""
    votes: int = 1
    """Passes whose probabilities are averaged in an evaluation: the cloud as it is, then with other points
    and scales of augment.scale."""
    smoothing: float = 0.2
    """Label smoothing e: 1 - e for the class, e / (classes - 1) for each other one, as PCT's."""
    data: PointData = field(default_factory=PointData)
    augment: PointAugment = field(default_factory=PointAugment)

    def checked(self) -> Self:
        a = self.augment
        at_least(2, points=self.points)
        at_least(1, {f"data.{k}": getattr(self.data, k) for k in ("train_clouds", "val_clouds")})
        at_least(1, votes=self.votes)
        shares({"augment.dropout": a.dropout, "smoothing": self.smoothing})
        at_least_0({f"augment.{k}": getattr(a, k) for k in ("translate", "jitter", "clip")})
        if not 0 < a.scale[0] <= a.scale[1]:
            raise ValueError(
                f"augment.scale: expected two factors above 0, the lower one first, got {a.scale}; use 1 1 "
                "for none"
            )
        wanted = "partseg" if self.kind == "parts" else "cls"
        if self.model not in (f"pct_ea_{wanted}", f"pct_{wanted}"):
            raise ValueError(
                f"model: expected pct_ea_{wanted} or pct_{wanted} with kind {self.kind}, got {self.model!r}; "
                "change model or kind"
            )
        if self.drop_path:
            raise ValueError(
                f"drop_path: expected 0, because these networks have no such option, got {self.drop_path:g}; "
                "leave it out"
            )
        if self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"batch_size: expected at least 2 clouds a backward pass, of which batch norms take "
                f"statistics, got {self.batch_size} in {self.accumulate}; raise it"
            )
        return super().checked()

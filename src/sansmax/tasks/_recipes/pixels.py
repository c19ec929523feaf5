"""A run that learns images sub-pixel by sub-pixel."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from .._data.settings import Data
from .._run import Run, at_least, shares

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe(Run):
    """A causal network that learns the next sub-pixel of small images, as one of 256 values."""

    task: ClassVar[str] = "pixels"

    model: str = "decoder"
    mechanism: str | None = "aft_local"
    """Of the mechanisms with a causal form."""
    img_size: int | None = None
    """Side of the images; None: as they are, of the bundled digits."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    level: int = 10
    """The largest number that is added to or taken from all sub-pixels of a training image."""
    dropout: float = 0.1
    data: Data = field(default_factory=Data)

    def checked(self) -> Self:
        at_least(1, {"data.num_samples": self.data.num_samples}, img_size=self.img_size)
        at_least(0, level=self.level)
        shares({"hflip": self.hflip, "dropout": self.dropout})
        if self.model != "decoder":
            raise ValueError(f"model: expected decoder, got {self.model!r}; leave it out")
        if self.img_size is None and self.data.root != "digits":
            raise ValueError("img_size: expected the side of the images, got none; add --img-size 32")
        return super().checked()

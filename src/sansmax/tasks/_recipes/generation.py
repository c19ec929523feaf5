"""A run that learns to make images, and to tell them from real ones."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from .._data.settings import Data
from .._run import Run, at_least, positive, shares

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe(Run):
    """A generator of small images and its discriminator, in turn. An update is one of either; epochs count
    the images that the updates of both could have seen."""

    task: ClassVar[str] = "generation"
    evaluated: ClassVar[tuple[str, ...]] = (*Run.evaluated, "inception")

    model: str = "gan"
    mechanism: str | None = "external"
    """In the middle of both networks; None: no attention."""
    img_size: int | None = None
    """Side of the images, 4 * 2^k; None: as they are, of the bundled digits."""
    conditional: bool = True
    """Whether images are generated and judged by class."""
    latent_dim: int = 128
    """Numbers of the noise."""
    d_steps: int = 5
    """Updates of the discriminator before each of the generator."""
    d_lr_scale: float = 1.0
    """Learning rate of the discriminator over the generator's."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    inception: str = ""
    """The weights of torch-fidelity's Inception, a .pth file, or hub: where torch.hub would keep it. With it
    FID and IS as published; without, figures of a small classifier that the run itself trains."""
    data: Data = field(default_factory=Data)

    @property
    def partial(self) -> bool:
        return True

    def turn(self, number: int) -> bool:
        """Whether the update with that number in the whole run is the generator's."""
        return number % (self.d_steps + 1) == self.d_steps

    def checked(self) -> Self:
        at_least(1, {"data.num_samples": self.data.num_samples}, d_steps=self.d_steps)
        at_least(1, latent_dim=self.latent_dim)
        shares({"hflip": self.hflip})
        positive({"d_lr_scale": self.d_lr_scale})
        if self.model != "gan":
            raise ValueError(f"model: expected gan, got {self.model!r}; leave it out")
        size = self.img_size
        if size is None and self.data.root != "digits":
            raise ValueError("img_size: expected the side of the images, got none; add --img-size 32")
        if size is not None and (size < 8 or size & (size - 1)):
            near = 2 ** max(3, round(max(size, 1)).bit_length() - 1)
            raise ValueError(
                f"img_size: expected 8, 16, 32, ..., which doubling 4 gives, got {size}; use {near}"
            )
        for name, value, why in (
            ("parallel", self.parallel == "fsdp", "ddp, as either network rests in the other's updates"),
            ("precision", self.precision == "fp16", "fp32 or bf16, as losses of both have no common scale"),
            ("compile", self.compile, "none, as singular values are found anew in every update"),
            ("drop_path", self.drop_path, "0, which these networks do not have"),
        ):
            if value:
                raise ValueError(f"{name}: expected {why}, got {getattr(self, name)}; leave it out")
        return super().checked()

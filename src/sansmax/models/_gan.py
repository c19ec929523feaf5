"""A generator of images and its discriminator: residual networks with any mechanism in the middle of both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from .. import layers
from ..ops._backend import no_autocast

__all__ = ["GAN", "Discriminator", "Generator", "Turn"]

FIRST = 4  # side of the generator's first map
NORMED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
UNIT, ITERATIONS = 1e-4, 5  # how far from 1 an averaged singular vector may be, and what mends it


class Turn(NamedTuple):
    """What an update sees: of the discriminator's images (B, C, S, S) and their classes (B,), of the
    generator's None; noise (B', Z) and classes (B',) of what is generated, None where there are none."""

    images: Tensor | None
    labels: Tensor | None
    noise: Tensor
    wanted: Tensor | None


class Attention(nn.Module):
    """x + gamma mixer(x) on the map's pixels, row by row; gamma begins at 0 (SAGAN, equation 3)."""

    def __init__(self, dim: int, side: int, mechanism: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.mixer = layers.mechanism(mechanism)(dim, **{"num_heads": 1, **options})
        self.mixer.set_input((side, side))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)"""
        y = self.mixer(x.flatten(2).mT, grid=tuple(x.shape[2:]))
        return x + self.gamma * y.mT.reshape(x.shape)


class ClassNorm(nn.Module):
    """(1 + a[y]) norm(x) + b[y], batch norm with a row of both tables for every class.

    y: classes (B,), or weights of all classes (B, K), which mix their rows.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, affine=not num_classes)
        self.gain = nn.Embedding(num_classes, dim) if num_classes else None
        self.bias = nn.Embedding(num_classes, dim) if num_classes else None

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        gain, bias = (row(table, y)[:, :, None, None] for table in (self.gain, self.bias))
        return (1 + gain) * x + bias


class Up(nn.Module):
    """norm, ReLU, twice as large, 3 x 3, norm, ReLU, 3 x 3, and a 1 x 1 skip."""

    def __init__(self, dim: int, out: int, num_classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ClassNorm(dim, num_classes), ClassNorm(out, num_classes)
        self.conv1, self.conv2 = nn.Conv2d(dim, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(dim, out, 1)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        z = self.conv1(F.interpolate(F.relu(self.norm1(x, y)), scale_factor=2.0, mode="nearest"))
        z = self.conv2(F.relu(self.norm2(z, y)))
        return z + F.interpolate(self.skip(x), scale_factor=2.0, mode="nearest")


class Down(nn.Module):
    """ReLU, 3 x 3, ReLU, 3 x 3, mean of 2 x 2, and a skip with a 1 x 1 where the map or its width changes.

    The first block of all sees an image, and begins without ReLU.
    """

    def __init__(self, dim: int, out: int, halve: bool, first: bool) -> None:
        super().__init__()
        self.halve, self.first = halve, first
        self.conv1, self.conv2 = nn.Conv2d(dim, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(dim, out, 1) if halve or dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.halve:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return self.skip(x) + y


class Generator(nn.Module):
    """noise (B, Z), classes -> images (B, C, S, S) in -1 to 1, S = 4 * 2^blocks.

    linear to 4 x 4, blocks `Up`, batch norm, ReLU, 3 x 3, tanh. Args: see GAN.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        latent_dim: int,
        widths: Sequence[int],
        mechanism: str | None,
        attention_after: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.stem = nn.Linear(latent_dim, widths[0] * FIRST**2)
        self.blocks = nn.ModuleList(Up(dim, out, num_classes) for dim, out in pairwise(widths))
        self.after = attention_after
        width, side = widths[attention_after], FIRST * 2**attention_after
        self.attention = Attention(width, side, mechanism, options) if mechanism else nn.Identity()
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Conv2d(widths[-1], in_chans, 3, padding=1)

    def forward(self, noise: Tensor, y: Tensor | None) -> Tensor:
        with whole_weights(self):
            x = self.stem(noise).unflatten(1, (-1, FIRST, FIRST))
            for i, block in enumerate(self.blocks, 1):
                x = block(x, y)
                if i == self.after:
                    x = self.attention(x)
            return torch.tanh(self.head(F.relu(self.norm(x))))


class Discriminator(nn.Module):
    """images (B, C, S, S), classes (B,) -> how real they are (B,): with h the sum of the last map's ReLU,

    w h + b + <v[y], h>, the last with classes alone (projection: Miyato and Koyama, 2018). Args: see GAN.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        side: int,
        widths: Sequence[int],
        halvings: int,
        mechanism: str | None,
        attention_after: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        dims = (in_chans, *widths[:-1])
        self.blocks = nn.ModuleList(
            Down(dim, out, i < halvings, i == 0)
            for i, (dim, out) in enumerate(zip(dims, widths, strict=True))
        )
        self.after = attention_after
        width, side = widths[attention_after - 1], side // 2 ** min(attention_after, halvings)
        self.attention = Attention(width, side, mechanism, options) if mechanism else nn.Identity()
        self.head = nn.Linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1]) if num_classes else None

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        score, projected = self.parts(x)
        return score if projected is None else score + projected.gather(1, y[:, None]).squeeze(1)  # pyright: ignore

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """w h + b, (B,), and <v[y], h> of every class y, (B, K)."""
        with whole_weights(self):
            for i, block in enumerate(self.blocks, 1):
                x = block(x)
                if i == self.after:
                    x = self.attention(x)
            h = F.relu(x).sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
            projected = None if self.embed is None else h @ self.embed.weight.T
            return self.head(h).squeeze(1), projected


class GAN(nn.Module):
    """A generator and a discriminator of images of 4 * 2^k pixels a side.

    Args:
        img_size: S. in_chans: of the images.
        num_classes: K; 0: images without classes.
        latent_dim: Z, the numbers of the noise.
        widths: of the generator: of the first map and behind every block; k = len(widths) - 1.
        discriminator_widths: behind each of its blocks.
        halvings: how many of them, the first, halve the map.
        mechanism: a file name of sansmax.layers, at both places; None: no attention.
        mechanism_args: the layer's own options; it has one head.
        attention_after: the generator's block behind which it stands.
        discriminator_attention_after: the discriminator's.
        discriminator_lr_scale: its learning rate over the generator's.

    Every linear layer, convolution and table of classes, those of the mechanism too, is divided by its
    largest singular value (spectral norm, one power iteration at a time); they begin orthogonal, biases at 0.

    Raises:
        ValueError: a size does not fit.

    Source: SAGAN (Zhang et al., 2019) with the residual blocks of Miyato and Koyama (2018). Sizes by default
    are those of PyTorch-StudioGAN (src/models/resnet.py) at 32 px.
    """

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        latent_dim: int = 128,
        widths: Sequence[int] = (256, 256, 256, 256),
        discriminator_widths: Sequence[int] = (128, 128, 128, 128),
        halvings: int = 2,
        mechanism: str | None = None,
        mechanism_args: dict[str, Any] | None = None,
        attention_after: int = 2,
        discriminator_attention_after: int = 1,
        discriminator_lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        blocks = len(widths) - 1
        if blocks < 1 or img_size != FIRST * 2**blocks:
            raise ValueError(
                f"widths: expected as many numbers as 4, 8, 16, ... {img_size}, the sides of the generator's "
                f"maps, got {len(widths)}; change it or the size of the images"
            )
        if not 1 <= halvings <= min(len(discriminator_widths), blocks + 1):
            raise ValueError(
                f"halvings: expected 1 to {min(len(discriminator_widths), blocks + 1)} of "
                f"{len(discriminator_widths)} blocks at {img_size} px, got {halvings}; change it"
            )
        places = (("", attention_after, blocks),)
        places += (("discriminator_", discriminator_attention_after, len(discriminator_widths)),)
        for name, after, most in places:
            if not 1 <= after <= most:
                raise ValueError(f"{name}attention_after: expected 1 to {most}, got {after}; change it")
        options = mechanism_args or {}
        self.generator = Generator(
            in_chans, num_classes, latent_dim, widths, mechanism, attention_after, options
        )
        self.discriminator = Discriminator(
            in_chans,
            num_classes,
            img_size,
            discriminator_widths,
            halvings,
            mechanism,
            discriminator_attention_after,
            options,
        )
        self.lr_scale = discriminator_lr_scale
        for module in list(self.modules()):
            if isinstance(module, NORMED):
                nn.init.orthogonal_(module.weight)
                if isinstance(getattr(module, "bias", None), Tensor):
                    nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
                spectral_norm(module)

    def forward(self, turn: Turn) -> Tensor:
        """The discriminator's scores. Of its own turn: of the images, then of what is generated; the
        generator gets no gradient. Of the generator's: of what is generated; the discriminator gets none."""
        if turn.images is None:
            fakes = self.generator(turn.noise, turn.wanted)
            named = self.discriminator.named_parameters()
            frozen: dict[str, Tensor] = {name: nn.Parameter(p.detach(), False) for name, p in named}
            return functional_call(self.discriminator, frozen, (fakes, turn.wanted))
        with torch.no_grad():
            fakes = self.generator(turn.noise, turn.wanted)
        both = None if turn.labels is None or turn.wanted is None else torch.cat([turn.labels, turn.wanted])
        return self.discriminator(torch.cat([turn.images, fakes.to(turn.images.dtype)]), both)

    def train(self, mode: bool = True) -> "GAN":
        """In eval mode the singular vectors stand still: those of averaged weights, which are averages and so
        too short, are found again."""
        super().train(mode)
        for module in () if mode else normed(self):
            norm: Any = module.parametrizations.weight  # pyright: ignore[reportAttributeAccessIssue]
            if any(abs(vector.norm().item() - 1) > UNIT for vector in norm.buffers()):
                norm.train()
                for _ in range(ITERATIONS):
                    _ = module.weight
                norm.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimiser: the generator's, and the discriminator's with lr_scale."""
        parts = ((self.generator, 1.0), (self.discriminator, self.lr_scale))
        return [
            {"params": list(part.parameters()), "weight_decay": weight_decay, "lr_scale": scale}
            for part, scale in parts
        ]


def row(table: nn.Embedding, y: Any) -> Tensor:
    """Of classes (B,), or the mean of all with weights (B, K)."""
    return y.to(table.weight.dtype) @ table.weight if y.is_floating_point() else table(y)


def normed(network: nn.Module) -> Iterator[nn.Module]:
    """Its modules with a spectral norm."""
    return (module for module in network.modules() if parametrize.is_parametrized(module, "weight"))


@contextmanager
def whole_weights(network: nn.Module) -> Iterator[None]:
    """Singular values are found outside autocast, whose matrix products are of half precision; and once."""
    with parametrize.cached():
        with no_autocast(next(network.parameters())):
            for module in normed(network):
                _ = module.weight
        yield

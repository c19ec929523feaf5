"""A block, or the pooling, in two steps: first every tile is counted, then each has its output."""

import itertools
from typing import Any, NamedTuple

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.cait import ClassAttn
from timm.models.vision_transformer import Block
from timm.models.xcit import ClassAttentionBlock, XCABlock
from torch import Tensor, nn

from ..layers import Mixer
from ..models._vit import GridBlock
from ..models._xcit import MixerXCBlock, SimAClassAttention, SimAClassAttentionBlock
from ..models.xvit import AffineXCBlock, ClassBlock
from ..ops._backend import no_autocast
from ..ops.aft import _triple

__all__ = ["ADVICE", "BLOCKS", "CLASS_BLOCKS", "GRID_BLOCKS", "Pool", "Stage", "check_local"]

BLOCKS = (Block, GridBlock)
GRID_BLOCKS = (XCABlock, MixerXCBlock, AffineXCBlock)
CLASS_BLOCKS = (ClassAttentionBlock, SimAClassAttentionBlock, ClassBlock)
# What has weights and looks at one token, or as a convolution at its neighbours.
LOCAL = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.BatchNorm2d, LayerScale)
ADVICE = "use a network of SimA, XNorm or AFTSimple, or an image that fits into memory"


class Counted(Exception):
    """A block has come to its layer, which has counted the tokens: the rest of it waits."""


class InParts(nn.Module):
    """In place of a layer of a block: first counts tokens, then gives their output from the sums."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.counting, self.skip = False, 0
        self.sums: Any = None

    def forward(self, x: Tensor, *_: Any, context: Tensor | None = None, **__: Any) -> Tensor:
        if self.counting:
            x = x if context is None else context
            self.sums = self.layer.token_sums(x[:, self.skip :], self.sums)
            raise Counted
        return self.layer.from_sums(x, self.sums)


class ClassSoftmax(nn.Module):
    """timm's class attention in parts: softmax over all tokens for the class token's query alone."""

    class Sums(NamedTuple):
        query: Tensor  # (B, H, 1, D), scaled
        triple: _triple.Triple

    def __init__(self, layer: ClassAttn) -> None:
        super().__init__()
        self.layer = layer

    def token_sums(self, x: Tensor, before: Sums | None = None) -> Sums:
        """See Mixer; the first part begins with the class token."""
        k, v = self._heads(self.layer.k(x)), self._heads(self.layer.v(x))
        with no_autocast(x):
            if before is None:
                query = self._heads(self.layer.q(x[:, :1])).double() * self.layer.scale
            else:
                query = before.query
            scores = k.double() @ query.mT  # (B, H, N, 1)
            found = _triple.total(_triple.Triple(v.double(), torch.ones_like(scores), scores))
            return self.Sums(query, found if before is None else _triple.combine(before.triple, found))

    def from_sums(self, x: Tensor, sums: Sums) -> Tensor:
        """(B, 1, C)."""
        y = _triple.finish(sums.triple).transpose(1, 2).flatten(2).to(x.dtype)
        return self.layer.proj_drop(self.layer.proj(y))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layer.num_heads, -1)).transpose(1, 2)


class Stage:
    """A block in two steps, each a tile at a time: `count`, then a call.

    Attributes:
        halo: how many tokens around it the block's convolutions see.
        enters: (1, P, C), tokens that stand in front of the tiles' from here on.
    """

    def __init__(self, block: nn.Module, name: str, enters: Tensor | None) -> None:
        self.enters, self.tells_grid = enters, type(block) in GRID_BLOCKS
        self.block: Any = block
        check_local(block, name, self.block.attn)
        self.block.attn = self.layer = InParts(_in_parts(self.block.attn, f"{name}.attn"))
        self.halo = sum(_reach(m) for m in self.block.modules() if isinstance(m, nn.Conv2d))

    def count(self, prefix: Tensor | None, x: Tensor) -> None:
        """The tokens x (n, m, C) enter the sums, and once those in front of them."""
        try:
            self.layer.counting = True
            self._forward(prefix, x)
        except Counted:
            self.layer.skip = _length(prefix)
        finally:
            self.layer.counting = False

    def __call__(self, prefix: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The block's output for the tokens in front and for x (n, m, C), of which `halo` lines are wrong at
        each side that is not the image's."""
        y = self._forward(prefix, x)
        first = _length(prefix)
        return y[:, :first] if first else None, y[0, first:].unflatten(0, x.shape[:2])

    def _forward(self, prefix: Tensor | None, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)[None]
        tokens = tokens if prefix is None else torch.cat([prefix, tokens], 1)
        return self.block(tokens, *x.shape[:2]) if self.tells_grid else self.block(tokens)


def _length(prefix: Tensor | None) -> int:
    return 0 if prefix is None else prefix.shape[1]


class Pool:
    """What forward_head pools the tokens to, behind the last norm.

    Attributes:
        first_alone: the class token is all that is asked for.
    """

    def __init__(self, norm: nn.Module, pool: str, with_prefix: bool, enters: Tensor | None) -> None:
        if pool not in ("avg", "token"):
            raise ValueError(
                f"predict_tiled: expected a network that pools its tokens by their mean or takes the class "
                f"token, got global_pool={pool!r}; {ADVICE}"
            )
        check_local(norm, "norm")
        self.norm, self.enters = norm, enters
        self.first_alone, self.with_prefix = pool == "token", with_prefix
        self.prefix: Tensor | None = None
        self.sum: Any = 0.0
        self.number, self.dtype = 0, torch.float64

    def count(self, prefix: Tensor | None, x: Tensor) -> None:
        """The tokens of a tile (n, m, C)."""
        x = x.flatten(0, 1)
        if self.prefix is None and prefix is not None:
            self.prefix = found = self.norm(prefix)
            if self.with_prefix and not self.first_alone:
                self.sum, self.number = found[0].double().sum(0), prefix.shape[1]
        if not self.first_alone:
            x = self.norm(x)
            self.sum, self.dtype = self.sum + x.double().sum(0), x.dtype
            self.number += len(x)

    def tokens(self) -> Tensor:
        """(1, n, C)."""
        if self.prefix is None:
            return self._mean()
        if self.first_alone:
            return self.prefix
        return self._mean() if self.with_prefix else torch.cat([self.prefix, self._mean()], 1)

    def _mean(self) -> Tensor:
        return (self.sum / self.number)[None, None].to(self.dtype)


def check_local(module: nn.Module, name: str, but: nn.Module | None = None) -> None:
    """Refuses a part with weights that might look further than LOCAL."""
    inside = set() if but is None else set(but.modules())
    for below, part in module.named_modules():
        known = (*LOCAL, *BLOCKS, *GRID_BLOCKS, *CLASS_BLOCKS)
        own = itertools.chain(part.parameters(False), part.buffers(False))
        if part not in inside and not isinstance(part, known) and next(own, None) is not None:
            raise ValueError(
                f"predict_tiled: expected layers that look at one token beside the attention, got "
                f"{type(part).__name__} at {name}.{below}; {ADVICE}"
            )


def _in_parts(layer: Any, name: str) -> Any:
    """The layer, or what computes it in parts."""
    if (isinstance(layer, Mixer) and layer.in_parts) or isinstance(layer, SimAClassAttention):
        return layer
    if type(layer) is ClassAttn:
        return ClassSoftmax(layer)
    raise ValueError(
        f"predict_tiled: expected layers that need of all tokens only sums (SimA, XNorm, AFTSimple), got "
        f"{type(layer).__name__} at {name}; {ADVICE}"
    )


def _reach(layer: nn.Conv2d) -> int:
    """Tokens to each side that a convolution of stride 1 sees."""
    return layer.dilation[0] * (layer.kernel_size[0] // 2)

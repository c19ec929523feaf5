"""A network as what a tile goes through: stem, positions, blocks, pooling, made of its own modules."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale
from timm.layers.patch_embed import PatchEmbed
from timm.models.cait import ClassAttn
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.xcit import ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit
from torch import Tensor, nn

from ..layers import Mixer
from ..layers._contract import Grid
from ..models._vit import GridBlock
from ..models._xcit import MixerXCBlock, SimAClassAttention, SimAClassAttentionBlock
from ..models.xvit import AffineXCBlock, ClassBlock, LearnedPositions
from ..ops._backend import no_autocast
from ..ops.aft import _triple

__all__ = ["Box", "Trunk", "trunk_of"]

BLOCKS = (Block, GridBlock)
GRID_BLOCKS = (XCABlock, MixerXCBlock, AffineXCBlock)
CLASS_BLOCKS = (ClassAttentionBlock, SimAClassAttentionBlock, ClassBlock)
# What has weights and looks at one token, or as a convolution at its neighbours.
LOCAL = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.BatchNorm2d, LayerScale)
ADVICE = "use a network of SimA, XNorm or AFTSimple, or an image that fits into memory"


class Box(NamedTuple):
    """A rectangle of tokens."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> Grid:
        return self.bottom - self.top, self.right - self.left

    def grown(self, by: int, grid: Grid) -> "Box":
        """With its neighbours, those that there are."""
        return Box(
            max(self.top - by, 0),
            min(self.bottom + by, grid[0]),
            max(self.left - by, 0),
            min(self.right + by, grid[1]),
        )

    def within(self, other: "Box") -> tuple[slice, slice]:
        """Its rows and columns among those of another around it."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )


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
        _check_local(block, name, self.block.attn)
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
        _check_local(norm, "norm")
        self.norm, self.enters = norm, enters
        self.first_alone, self.with_prefix = pool == "token", with_prefix
        self.prefix: Tensor | None = None
        self.sum: Any = 0.0
        self.number = 0

    def count(self, prefix: Tensor | None, x: Tensor) -> None:
        """The tokens of a tile (n, m, C)."""
        x = x.flatten(0, 1)
        if self.prefix is None and prefix is not None:
            self.prefix = found = self.norm(prefix)
            if self.with_prefix and not self.first_alone:
                self.sum, self.number = found[0].double().sum(0), prefix.shape[1]
        if not self.first_alone:
            self.sum = self.sum + self.norm(x).double().sum(0)
            self.number += len(x)

    def tokens(self) -> Tensor:
        """(1, n, C)."""
        if self.prefix is None:
            return self._mean()
        if self.first_alone:
            return self.prefix
        mean = self._mean().to(self.prefix.dtype)
        return mean if self.with_prefix else torch.cat([self.prefix, mean], 1)

    def _mean(self) -> Tensor:
        return (self.sum / self.number)[None, None]


@dataclass
class Trunk:
    """A copy of a network in parts, with the same tensors. Stages and pool hold the sums of one image: a new
    one is made for each.

    Attributes:
        halo: how many tokens around it an embedded tile needs.
        embed: pixels (1, in_chans, height, width) -> tokens (n, m, C).
        positions: of a grid -> of a box in it -> (n, m, C); None for a network without.
        norm_pre: what follows the positions, token by token.
        head: the network's own, from tokens.
    """

    patch: int
    in_chans: int
    dim: int
    weight: Tensor
    halo: int
    embed: Callable[[Tensor], Tensor]
    positions: Callable[[Grid], Callable[[Box], Tensor]] | None
    norm_pre: nn.Module
    stages: list[Stage]
    pool: Pool
    head: Callable[[Tensor], Tensor]

    @property
    def files(self) -> int:
        """As a block that sees neighbours cannot write over them."""
        return 2 if any(stage.halo for stage in self.stages) else 1

    def grid(self, size: Grid) -> Grid:
        """Rows and columns of tokens of an image."""
        return -(-size[0] // self.patch), -(-size[1] // self.patch)

    def tokens_bytes(self, grid: Grid) -> int:
        """Of all its tokens."""
        return grid[0] * grid[1] * self.dim * self.weight.element_size()

    def check_tile(self, tile: int) -> None:
        """Refuses a side that is no whole number of patches."""
        if tile < 1 or tile % self.patch:
            raise ValueError(
                f"tile: expected a multiple of the patch of {self.patch} pixels, got {tile}; use "
                f"{max(1, round(tile / self.patch)) * self.patch}"
            )


def trunk_of(model: Any) -> Trunk:
    """The network in parts.

    Raises:
        ValueError: it is another network, or has a layer without a form in parts.
    """
    model = _shared(model)
    for base, make in ((VisionTransformer, _vit), (Xcit, _xcit)):
        if isinstance(model, base) and all(
            getattr(type(model), name, None) is getattr(base, name, None)
            for name in ("forward", "forward_head", "forward_cls", "pool", "_pos_embed")
        ):
            return make(model)
    raise ValueError(
        f"predict_tiled: expected a Vision Transformer or an XCiT, got {type(model).__name__}; {ADVICE}"
    )


def _vit(model: Any) -> Trunk:
    stem = model.patch_embed
    if type(stem).forward is not PatchEmbed.forward or stem.patch_size[0] != stem.patch_size[1]:
        raise ValueError(
            f"predict_tiled: expected a patch embedding of convolutions with square patches, got "
            f"{type(stem).__name__}; {ADVICE}"
        )
    if model.attn_pool is not None:
        raise ValueError(
            f"predict_tiled: expected a network that pools its tokens by their mean or takes the class "
            f"token, got {type(model.attn_pool).__name__}; {ADVICE}"
        )
    for name in ("patch_embed", "norm_pre"):
        _check_local(getattr(model, name), name)
    patch = stem.patch_size[0]

    def embed(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        y = stem.proj(F.pad(pixels, (0, -width % patch, 0, -height % patch)))
        return stem.norm(y.flatten(2).mT)[0].unflatten(0, y.shape[-2:])

    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    enters, positions = torch.cat(prefix, 1) if prefix else None, None
    table = model.pos_embed
    if table is not None:
        first = 0 if model.no_embed_class else model.num_prefix_tokens
        if first and enters is not None:
            enters = enters + table[:, :first]
        positions = _resampled(table[:, first:], stem.grid_size)
    if enters is not None:
        enters = model.norm_pre(enters)
    stages = [
        Stage(block, f"blocks.{i}", None if i else enters)
        for i, block in enumerate(_known(model.blocks, "blocks", BLOCKS))
    ]
    pool = Pool(model.norm, model.global_pool, model.pool_include_prefix, None)
    return _trunk(model, stem.proj, patch, embed, positions, model.norm_pre, stages, pool)


def _xcit(model: Any) -> Trunk:
    if type(model.patch_embed) is not ConvPatchEmbed:
        raise ValueError(
            f"predict_tiled: expected XCiT's patch embedding, got {type(model.patch_embed).__name__}; "
            f"{ADVICE}"
        )
    stem = model.patch_embed

    def embed(pixels: Tensor) -> Tensor:
        tokens, grid = stem(pixels)
        return tokens[0].unflatten(0, grid)

    positions, table = None, model.pos_embed
    if isinstance(table, LearnedPositions):
        positions = _resampled(table.table, table.grid)
    elif isinstance(table, PositionalEncodingFourier):
        positions = _separable(table)
    elif table is not None:
        raise ValueError(
            f"predict_tiled: expected Fourier or learned positions, got {type(table).__name__}; {ADVICE}"
        )
    class_blocks = _known(model.cls_attn_blocks, "cls_attn_blocks", CLASS_BLOCKS)
    stages = [
        Stage(block, f"blocks.{i}", None)
        for i, block in enumerate(_known(model.blocks, "blocks", GRID_BLOCKS))
    ]
    stages += [
        Stage(block, f"cls_attn_blocks.{i}", None if i else model.cls_token)
        for i, block in enumerate(class_blocks)
    ]
    pool = Pool(model.norm, model.global_pool, False, None if class_blocks else model.cls_token)
    return _trunk(model, stem, stem.patch_size, embed, positions, nn.Identity(), stages, pool)


def _trunk(
    model: Any,
    stem: nn.Module,
    patch: int,
    embed: Callable[[Tensor], Tensor],
    positions: Callable[[Grid], Callable[[Box], Tensor]] | None,
    norm_pre: nn.Module,
    stages: list[Stage],
    pool: Pool,
) -> Trunk:
    weight = next(stem.parameters())
    reach, stride = 0, 1
    for module in stem.modules():
        if isinstance(module, nn.Conv2d):
            # A kernel as wide as its stride sees its own patch alone.
            reach += stride * module.padding[0]  # pyright: ignore[reportOperatorIssue]
            stride *= module.stride[0]
    halo = -(-reach // patch)
    return Trunk(
        patch,
        model.in_chans,
        model.embed_dim,
        weight,
        halo,
        embed,
        positions,
        norm_pre,
        stages,
        pool,
        model.forward_head,
    )


def _known(blocks: Any, name: str, kinds: tuple[type, ...]) -> list[nn.Module]:
    for i, block in enumerate(blocks):
        if type(block) not in kinds:
            raise ValueError(
                f"predict_tiled: expected {name} of {', '.join(kind.__name__ for kind in kinds)}, got "
                f"{type(block).__name__} at {name}.{i}; {ADVICE}"
            )
    return list(blocks)


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


def _check_local(module: nn.Module, name: str, but: nn.Module | None = None) -> None:
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


def _reach(layer: nn.Conv2d) -> int:
    """Tokens to each side that a convolution of stride 1 sees."""
    return layer.dilation[0] * (layer.kernel_size[0] // 2)


def _shared(module: nn.Module) -> Any:
    """A copy in eval mode with the same tensors."""
    tensors: Iterator[Tensor] = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()


def _resampled(table: Tensor, old: Grid) -> Callable[[Grid], Callable[[Box], Tensor]]:
    """Boxes of timm's resample_abs_pos_embed, which treats rows and columns one after the other."""
    values = table[0].unflatten(0, old).float()

    def of_grid(grid: Grid) -> Callable[[Box], Tensor]:
        rows, columns = (
            F.interpolate(
                torch.eye(few, device=table.device)[None, None], (many, few), mode="bicubic", antialias=True
            )[0, 0]
            for few, many in zip(old, grid, strict=True)
        )

        def of_box(box: Box) -> Tensor:
            across = torch.einsum("jw,hwc->hjc", columns[box.left : box.right], values)
            return torch.einsum("ih,hjc->ijc", rows[box.top : box.bottom], across).to(table.dtype)

        return of_box

    return of_grid


def _separable(module: PositionalEncodingFourier) -> Callable[[Grid], Callable[[Box], Tensor]]:
    """Boxes of Fourier positions, a sum of one term of the row and one of the column."""
    dtype = next(module.parameters()).dtype
    module = copy.deepcopy(module).double()

    def of_grid(grid: Grid) -> Callable[[Box], Tensor]:
        rows, columns, both = (
            module(1, *size)[0].permute(1, 2, 0) for size in ((grid[0], 1), (1, grid[1]), (1, 1))
        )
        columns = columns - both

        def of_box(box: Box) -> Tensor:
            return (rows[box.top : box.bottom] + columns[:, box.left : box.right]).to(dtype)

        return of_box

    return of_grid

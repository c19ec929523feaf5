"""A network as what a tile goes through: stem, positions, blocks, pooling, made of its own modules."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import ConvPatchEmbed, PositionalEncodingFourier, Xcit
from torch import Tensor, nn

from ..layers._contract import Grid
from ..models.xvit import LearnedPositions
from ._positions import resampled, separable
from ._scratch import Box
from ._stage import ADVICE, BLOCKS, CLASS_BLOCKS, GRID_BLOCKS, Pool, Stage, check_local

__all__ = ["Trunk", "trunk_of"]


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
        check_local(getattr(model, name), name)
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
        positions = resampled(table[:, first:], stem.grid_size)
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
        positions = resampled(table.table, table.grid)
    elif isinstance(table, PositionalEncodingFourier):
        positions = separable(table)
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


def _shared(module: nn.Module) -> Any:
    """A copy in eval mode with the same tensors."""
    tensors: Iterator[Tensor] = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()

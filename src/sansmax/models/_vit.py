"""timm's VisionTransformer with any mechanism."""

import itertools
import re
from collections.abc import Collection
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, load_checkpoint, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .. import layers
from .._find import pick
from ..layers import Mixer
from ..layers._aft import PositionBiasMixer
from ..layers._contract import Grid
from ._layouts import square

__all__ = ["DEIT", "TRUNK_MODULES", "GridBlock", "ViT", "bound", "create_vit", "vit_mini"]

# timm's files with entrypoints of the VisionTransformer class, and this one.
TRUNK_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", __name__.rpartition(".")[2])


# The three sizes of DeiT with patches of 16, for images of any size.
DEIT: dict[str, dict[str, Any]] = {
    size: {
        "patch_size": 16,
        "embed_dim": width,
        "num_heads": width // 64,
        "depth": 12,
        "dynamic_img_size": True,
        "dynamic_img_pad": True,
    }
    for size, width in (("tiny", 192), ("small", 384), ("base", 768))
}


class GridBlock(Block):
    """timm's Block, which also tells its mechanism the patch grid of this very image."""

    attn: Any

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid: Grid | None = None,
    ) -> Tensor:
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, grid=grid)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViT(VisionTransformer):
    """timm's VisionTransformer with a mechanism for its attention, whose layers are told the patch grid.

    Args:
        mechanism: a file name of sansmax.layers.
        mechanism_args: the layer's own options; they also override what the trunk passes (num_heads).
        **words: see timm.models.vision_transformer.VisionTransformer. With dynamic_img_size=True images may
            have any size: position embedding and the layers' tables are resampled for the image alone.
            dynamic_img_pad=True fills sides that are no multiple of the patch with zeros.
    """

    blocks: Any
    patch_embed: Any

    def __init__(
        self, *, mechanism: str = "softmax", mechanism_args: dict[str, Any] | None = None, **words: Any
    ) -> None:
        layer = layers.mechanism(mechanism)
        _check_patch_drop(type(self).__name__, mechanism, words)
        super().__init__(**{"attn_layer": bound(layer, mechanism_args or {}), "block_fn": GridBlock, **words})
        self.settle()

    def settle(self) -> None:
        """Tells the layers the grid, then draws their tables anew in the sizes that follow from it."""
        self.tell_mixers()
        for mixer in self.mixers().values():
            mixer.reset_parameters()

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layers by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Another image or patch size: resamples the position embedding and the layers' tables."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.tell_mixers()

    def tell_mixers(self) -> None:
        """Tells the blocks' layers the patch grid and the number of tokens in front of it."""
        for layer in self.blocks.modules():
            if isinstance(layer, Mixer):
                layer.set_input(self.patch_embed.grid_size, self.num_prefix_tokens)

    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: timm's and the layers' position tables."""
        own = {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}
        return super().no_weight_decay() | own

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LayerScale's keys of SimA-DeiT and DeiT in timm's, and tables of positions resampled.

        A checkpoint of another image size fits where its grid is square, or has as many patches.
        """
        state = {re.sub(r"^(blocks\.\d+)\.gamma_?([12])$", r"\1.ls\2.gamma", k): v for k, v in state.items()}
        grid, prefix = self.patch_embed.grid_size, self.num_prefix_tokens
        table = state.get("pos_embed")
        if table is not None and self.pos_embed is not None and table.shape != self.pos_embed.shape:
            own = 0 if self.no_embed_class else prefix
            fits = table.shape[2:] == self.pos_embed.shape[2:]
            if fits and (old := square(table.shape[1] - own)):
                state["pos_embed"] = resample_abs_pos_embed(table, list(grid), list(old), own)
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, PositionBiasMixer):
                for key in (f"blocks.{name}.{table}" for table in layer.position_tables):
                    found = state.get(key)
                    if found is None or found.ndim != 2 or len(found) == layer.max_tokens:
                        continue
                    fits = layer.factor_dim is not None or found.shape[1] == len(found)
                    if fits and (old := square(len(found) - prefix)):
                        state[key] = layer.resampled(found, old, grid, prefix)
        return state

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, in_chans, height, width) -> (B, prefix + rows * columns, C), normalised."""
        return self.norm(self._run_blocks(x, attn_mask, is_causal)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens behind the blocks `indices`; see timm's VisionTransformer.forward_intermediates."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}; use NCHW"
            )
        wanted, deepest = feature_take_indices(len(self.blocks), indices)
        last = deepest + 1 if stop_early else len(self.blocks)
        x, taken, grid = self._run_blocks(x, attn_mask, is_causal, wanted, last)
        taken = [self.norm(y) if norm else y for y in taken]
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            taken = [y.mT.unflatten(-1, grid).contiguous() for y in taken]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": taken}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        if with_prefix:
            taken = list(zip(taken, prefix, strict=True))
        return taken if intermediates_only else (self.norm(x), taken)

    def _run_blocks(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        wanted: Collection[int] = (),
        last: int | None = None,
    ) -> tuple[Tensor, list[Tensor], Grid]:
        """The tokens behind the blocks up to `last`, those behind the blocks `wanted`, and their grid.

        timm's own loop cannot tell a block the grid, which no token count gives.
        """
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        taken = []
        for i, block in enumerate(self.blocks[:last]):
            words: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
            if is_causal:
                words["is_causal"] = True
            if isinstance(block, GridBlock):
                words["grid"] = grid
            x = checkpoint(block, x, **words) if self.grad_checkpointing else block(x, **words)
            if i in wanted:
                taken.append(x)
        return x, taken, grid


def create_vit(
    trunk: str, mechanism: str, mechanism_args: dict[str, Any] | None, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """One of timm's own ViTs; see sansmax.create_model."""
    layer = layers.mechanism(mechanism)
    options = dict(mechanism_args or {})
    if pretrained:
        _check_pretrained(mechanism, layer, options)
    _check_patch_drop(trunk, mechanism, kwargs)
    if kwargs.get("class_token") is False:
        kwargs.setdefault("global_pool", "avg")
    checkpoint_path = kwargs.pop("checkpoint_path", None)
    attn_layer = bound(layer, options) if options else layer
    model: Any = timm.create_model(trunk, pretrained=pretrained, attn_layer=attn_layer, **kwargs)
    vit: Any = getattr(model, "model", model)
    built = type(vit)
    if built is not VisionTransformer or not all(
        any(isinstance(module, layer) for module in block.modules()) for block in vit.blocks
    ):
        raise ValueError(
            f"{trunk}: the trunk must be timm's VisionTransformer with an attention that can be replaced, "
            f"got {built.__name__}; use for example vit_tiny_patch16_224"
        )
    # timm's entrypoints decide which classes they build; ours add only methods to them.
    vit.__class__ = ViT
    for block in vit.blocks:
        if type(block) is Block:
            block.__class__ = GridBlock
        elif layer.traits.needs and kwargs.get("dynamic_img_size"):
            raise ValueError(
                f"{trunk}: dynamic_img_size must be off because mechanism {mechanism!r} needs the grid, "
                f"which a {type(block).__name__} does not pass on, got True; use model.set_input_size((H, W))"
            )
    vit.settle()
    if "attn_layer" in getattr(model, "_model_args", {}):
        model._model_args["attn_layer"] = mechanism  # a bound class cannot be pickled
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)  # not by timm, which would load before the tables fit
    return model


def bound(layer: type[Mixer], options: dict[str, Any]) -> type[Mixer]:
    """A class, because timm asks issubclass, whose instances are `layer` itself with `options`."""

    class Bound(layer):
        def __new__(cls, *args, **words):
            return layer(*args, **{**words, **options})

    return Bound


def _check_patch_drop(trunk: str, mechanism: str, words: dict[str, Any]) -> None:
    if layers.mechanism(mechanism).traits.needs and words.get("patch_drop_rate"):
        raise ValueError(
            f"{trunk}: patch_drop_rate must be 0 because mechanism {mechanism!r} needs the whole grid of "
            f"tokens, got {words['patch_drop_rate']}; use drop_path_rate"
        )


def _check_pretrained(mechanism: str, layer: type[Mixer], options: dict[str, Any]) -> None:
    def shapes(make: type[Mixer], **own: Any) -> dict[str, torch.Size]:
        state = make(12, **{"num_heads": 3, "device": "meta", **own}).state_dict()
        return {key: value.shape for key, value in state.items()}

    if shapes(layer, **options) != shapes(layers.mechanism("softmax")):
        raise ValueError(
            f"pretrained=True needs the parameters of softmax attention, which mechanism {mechanism!r} with "
            f"{options or 'its defaults'} does not have; build it with pretrained=False"
        )


class ConvStem(PatchEmbed):
    """Patches through 3 x 3 convolutions of stride 2 with batch norm, as many as halve a patch to one token.

    Channels double on the way to embed_dim, and a 1 x 1 convolution ends it
    (https://arxiv.org/abs/2106.14881).
    """

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 768, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        sides: Any = self.patch_size
        patch = sides[0]
        if patch < 2 or patch & (patch - 1) or sides[1] != patch:
            raise ValueError(
                f"patch_size: expected a square power of 2 with stem='conv', got {self.patch_size}; use 2, "
                "4, 8 or 16"
            )
        halvings = patch.bit_length() - 1
        widths = [in_chans, *(max(8, embed_dim >> (halvings - 1 - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))  # pyright: ignore[reportAttributeAccessIssue]


STEMS: dict[str, type[PatchEmbed]] = {"patch": PatchEmbed, "conv": ConvStem}
default_cfgs = generate_default_cfgs({"vit_mini.untrained": {"classifier": "head", "num_classes": 1000}})


@register_model
def vit_mini(pretrained: bool = False, stem: str = "patch", **kwargs: Any) -> VisionTransformer:
    """A Vision Transformer for small images: 96 channels, 4 blocks, 3 heads, patches of 4.

    Args:
        stem: patch, one convolution as in every Vision Transformer, or conv, see ConvStem.
    """
    words = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs}
    model = build_model_with_cfg(
        VisionTransformer,
        "vit_mini",
        pretrained,
        feature_cfg={"out_indices": words.pop("out_indices", 3), "feature_cls": "getter"},
        embed_layer=STEMS[pick("stems", stem, STEMS)],
        **words,
    )
    positions = getattr(model, "pos_embed", None)
    if isinstance(positions, nn.Parameter):
        # As large as the patches' embedding. timm's 0.02 suits long training: 84 % on the digits with softmax
        # after 16 epochs, 98.9 % with 0.5.
        nn.init.trunc_normal_(positions, std=0.5)
    return model

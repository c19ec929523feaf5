"""timm's VisionTransformer with any mechanism."""

from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, load_checkpoint, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .. import layers
from ..layers import Mixer

__all__ = ["TRUNK_MODULES", "ViT", "create_vit", "vit_mini"]

# timm's files with entrypoints of the VisionTransformer class, and this one.
TRUNK_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", __name__.rpartition(".")[2])


class ViT(VisionTransformer):
    """timm's VisionTransformer with a mechanism for its attention, whose layers are told the patch grid.

    Args:
        mechanism: a file name of sansmax.layers.
        mechanism_args: the layer's own options; they also override what the trunk passes (num_heads).
        **words: see timm.models.vision_transformer.VisionTransformer.
    """

    def __init__(
        self, *, mechanism: str = "softmax", mechanism_args: dict[str, Any] | None = None, **words: Any
    ) -> None:
        layer = layers.mechanism(mechanism)
        super().__init__(attn_layer=_bound(layer, mechanism_args or {}), **words)
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
        """Tells every layer the patch grid and the number of tokens in front of it."""
        for layer in self.mixers().values():
            layer.set_input(self.patch_embed.grid_size, self.num_prefix_tokens)

    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: timm's and the layers' position tables."""
        own = {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}
        return super().no_weight_decay() | own


def create_vit(
    trunk: str, mechanism: str, mechanism_args: dict[str, Any] | None, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """One of timm's own ViTs; see sansmax.create_model."""
    layer = layers.mechanism(mechanism)
    options = dict(mechanism_args or {})
    if pretrained:
        _check_pretrained(mechanism, layer, options)
    for argument in ("dynamic_img_size", "patch_drop_rate"):
        if layer.traits.needs and kwargs.get(argument):
            raise ValueError(
                f"{trunk}: {argument} must be off because mechanism {mechanism!r} needs a fixed grid "
                f"of tokens, got {kwargs[argument]}; change the size with model.set_input_size((H, W))"
            )
    if kwargs.get("class_token") is False:
        kwargs.setdefault("global_pool", "avg")
    checkpoint_path = kwargs.pop("checkpoint_path", None)
    attn_layer = _bound(layer, options) if options else layer
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
    # timm's entrypoints decide which class they build; ViT adds only methods to it.
    vit.__class__ = ViT
    vit.settle()
    if "attn_layer" in getattr(model, "_model_args", {}):
        model._model_args["attn_layer"] = mechanism  # a bound class cannot be pickled
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)  # not by timm, which would load before the tables fit
    return model


def _bound(layer: type[Mixer], options: dict[str, Any]) -> type[Mixer]:
    """A class, because timm asks issubclass, whose instances are `layer` itself with `options`."""

    class Bound(layer):
        def __new__(cls, *args, **words):
            return layer(*args, **{**words, **options})

    return Bound


def _check_pretrained(mechanism: str, layer: type[Mixer], options: dict[str, Any]) -> None:
    def shapes(make: type[Mixer], **own: Any) -> dict[str, torch.Size]:
        state = make(12, **{"num_heads": 3, "device": "meta", **own}).state_dict()
        return {key: value.shape for key, value in state.items()}

    if shapes(layer, **options) != shapes(layers.mechanism("softmax")):
        raise ValueError(
            f"pretrained=True needs the parameters of softmax attention, which mechanism {mechanism!r} with "
            f"{options or 'its defaults'} does not have; build it with pretrained=False"
        )


default_cfgs = generate_default_cfgs({"vit_mini.untrained": {"classifier": "head", "num_classes": 1000}})


@register_model
def vit_mini(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A Vision Transformer for small images: 96 channels, 4 blocks, 3 heads, patches of 4."""
    words = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_mini",
        pretrained,
        feature_cfg={"out_indices": words.pop("out_indices", 3), "feature_cls": "getter"},
        **words,
    )

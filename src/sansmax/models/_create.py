"""Any trunk with any mechanism."""

from typing import Any

import timm
from torch import nn

from .. import layers
from .._find import names, pick
from ._register import registered
from ._vit import TRUNK_MODULES, create_vit
from ._xcit import create_xcit

__all__ = ["create_model", "trunks"]


# The small network of every trunk.
FAMILIES = {
    "vit": "vit_small_patch16_224",
    "deit": "deit_small_patch16_224",
    "xcit": "xcit_small_12_p16_224",
    "cvt": "sima_cvt_13",
    "pyramid": "soft_tiny",
    "t2t": "eamlp_14",
}


def trunks() -> list[str]:
    """The names that create_model takes."""
    modules = ("xcit", *TRUNK_MODULES)
    return [
        *FAMILIES,
        *registered(),
        *(name for module in modules for name in timm.list_models(module=module)),
    ]


def create_model(
    trunk: str,
    mechanism: str | None = None,
    *,
    mechanism_args: dict[str, Any] | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A network with any mechanism in place of its attention.

    Args:
        trunk: a name of timm whose class is VisionTransformer ("vit_tiny_patch16_224",
            "deit_small_patch16_224") or Xcit ("xcit_small_12_p16_224"), a network of sansmax.models
            ("sima_tiny_12_p16", "sima_tiny_12_p16_pyramid"), "vit_mini", or a family, which is its small
            network: "vit", "deit", "xcit", "cvt", "pyramid", "t2t".
        mechanism: a file name of sansmax.layers ("xnorm"). None is the trunk's own, softmax for a family;
            "softmax" in an XCiT trunk is its cross-covariance attention.
        mechanism_args: the layer's own options; they also override what the trunk passes (num_heads).
        pretrained: timm's weights; only where the mechanism has softmax's parameters (sima, aft_simple,
            xnorm with gamma=False) in a VisionTransformer, or without another mechanism.
        **kwargs: timm's (img_size=224 or (height, width), num_classes, patch_size, class_token, global_pool,
            drop_path_rate, features_only, ...). class_token=False pools unless global_pool says otherwise.

    Returns:
        A network with timm's interface, or timm's wrapper around it with features_only=True.

    Raises:
        ValueError: an unknown name (with the nearest), or an argument that the mechanism cannot follow.
    """
    if mechanism is not None:
        mechanism = pick("layers", mechanism, names(layers.__name__))
    if trunk in FAMILIES:
        trunk, mechanism = FAMILIES[trunk], mechanism or "softmax"
    name = trunk.partition(".")[0]  # behind the dot: a tag of pretrained weights
    if name in registered():
        chosen: dict[str, Any] = {} if mechanism is None else {"mechanism": mechanism}
        if mechanism_args:
            chosen["mechanism_args"] = mechanism_args
        return timm.create_model(trunk, pretrained=pretrained, **chosen, **kwargs)
    if name in timm.list_models(module="xcit"):
        return create_xcit(trunk, mechanism or "softmax", mechanism_args, pretrained, **kwargs)
    if name not in trunks():
        pick("trunks", name, trunks())
    return create_vit(trunk, mechanism or "softmax", mechanism_args, pretrained, **kwargs)

"""Attention without softmax, in linear time: SimA, SOFT, X-ViT, External Attention and AFT.

Importing this loads torch and nothing heavier; `sansmax.layers`, `sansmax.create_model` and the rest load
what they need (timm, torchvision) when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sansmax.ops.aft import (
    aft_conv,
    aft_conv_init_state,
    aft_conv_step,
    aft_full,
    aft_full_init_state,
    aft_full_step,
    aft_local,
    aft_local_init_state,
    aft_local_step,
    aft_simple,
    aft_simple_init_state,
    aft_simple_step,
)
from sansmax.ops.external import external
from sansmax.ops.sima import sima, sima_init_state, sima_step
from sansmax.ops.soft import newton_inverse, soft
from sansmax.ops.softmax import softmax
from sansmax.ops.xnorm import xnorm, xnorm_init_state, xnorm_step

if TYPE_CHECKING:
    from sansmax import layers, maps, models
    from sansmax.adapt.swap import swap
    from sansmax.adapt.transformers import register_transformers
    from sansmax.audit import audit
    from sansmax.export import export_model
    from sansmax.maps import attention_map, attention_rollout
    from sansmax.models import create_model, load_published, optimize_for_inference
    from sansmax.tiles import predict_tiled

__version__ = "0.1.0"

__all__ = [
    "aft_conv",
    "aft_conv_init_state",
    "aft_conv_step",
    "aft_full",
    "aft_full_init_state",
    "aft_full_step",
    "aft_local",
    "aft_local_init_state",
    "aft_local_step",
    "aft_simple",
    "aft_simple_init_state",
    "aft_simple_step",
    "attention_map",
    "attention_rollout",
    "audit",
    "create_model",
    "export_model",
    "external",
    "layers",
    "load_published",
    "maps",
    "models",
    "newton_inverse",
    "optimize_for_inference",
    "predict_tiled",
    "register_transformers",
    "sima",
    "sima_init_state",
    "sima_step",
    "soft",
    "softmax",
    "swap",
    "xnorm",
    "xnorm_init_state",
    "xnorm_step",
]


_ELSEWHERE = {
    "attention_map": "maps",
    "attention_rollout": "maps",
    "create_model": "models",
    "export_model": "export",
    "load_published": "models",
    "optimize_for_inference": "models",
    "predict_tiled": "tiles",
    "register_transformers": "adapt.transformers",
    "swap": "adapt.swap",
}


def __getattr__(name: str) -> Any:
    if name in ("audit", "layers", "maps", "models"):
        return import_module(f"sansmax.{name}")
    if name in _ELSEWHERE:
        return getattr(import_module(f"sansmax.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module 'sansmax' has no attribute {name!r}")

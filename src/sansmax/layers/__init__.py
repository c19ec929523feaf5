"""Parameters around one operator: (B, N, C) -> (B, N, C). A file without a leading underscore is a mechanism.

Importing this package enters all of them under their file names in timm's ATTN_LAYERS, so that
timm.create_model("vit_tiny_patch16_224", attn_layer="sima") works as well as attn_layer=sansmax.layers.SimA.
"""

import timm.models.vision_transformer as timm_vit

from .._find import load, names
from ._contract import Mixer, Traits

__all__ = ["Mixer", "Traits", "mechanism", "mechanisms"]


def mechanism(name: str) -> type[Mixer]:
    """The layer class in the file `name`; ValueError with the nearest name if there is no such file."""
    module = load(__name__, name)
    (layer,) = (
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Mixer) and c.__module__ == module.__name__
    )
    return layer


def mechanisms() -> dict[str, type[Mixer]]:
    """All layer classes by file name."""
    return {name: mechanism(name) for name in names(__name__)}


_BY_CLASS = {layer.__name__: layer for layer in mechanisms().values()}


def __getattr__(name: str) -> type[Mixer]:
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


timm_vit.ATTN_LAYERS.update(mechanisms())

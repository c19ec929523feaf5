"""Whole networks, registered in timm when this package is imported; a file without an underscore is one."""

from .._find import load, names
from ._vit import ViT, create_model

__all__ = ["ViT", "create_model"]

for _name in names(__name__):
    load(__name__, _name)

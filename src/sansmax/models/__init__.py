"""Whole networks, registered in timm when this package is imported; a file without an underscore is one."""

from .._find import load, names
from ._create import create_model
from ._cvt import CvT
from ._decoder import Decoder
from ._eanet import EANet
from ._fpn import FPNBackbone
from ._gan import GAN
from ._inference import optimize_for_inference
from ._published import load_published
from ._pyramid import Pyramid
from ._register import networks
from ._t2t import T2T
from ._vit import ViT
from ._xcit import XCiT

__all__ = [
    "GAN",
    "T2T",
    "CvT",
    "Decoder",
    "EANet",
    "FPNBackbone",
    "Pyramid",
    "ViT",
    "XCiT",
    "create_model",
    "load_published",
    "networks",
    "optimize_for_inference",
]

for _name in names(__name__):
    load(__name__, _name)

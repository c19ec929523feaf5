"""Attention Free Transformer: four ways to bias a softmax over time, per channel, behind a sigmoid gate.

Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103). The equations are in full, local,
simple and conv.
"""

from .conv import aft_conv, aft_conv_init_state, aft_conv_step, reparameterize
from .full import aft_full, aft_full_init_state, aft_full_step
from .local import aft_local, aft_local_init_state, aft_local_step
from .simple import aft_simple, aft_simple_init_state, aft_simple_step

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
    "reparameterize",
]

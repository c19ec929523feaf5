"""Every layer, its projections included, against timm's softmax attention of the same width.

SOFT on a square grid that 7 divides is measured with 7 x 7 landmarks by a convolution of that stride, as its
published networks have it, and against its published form too.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers.attention import Attention

from .. import layers
from .._find import names as files
from .._find import pick
from ..layers.soft import SOFT
from ._published import PublishedSOFT
from .cases import Case, Form, module_form
from .ops import Shape

__all__ = ["layer_cases"]


def layer_cases(
    names: Sequence[str],
    *,
    tokens: Sequence[int],
    batch: Sequence[int],
    heads: Sequence[int],
    dim: Sequence[int],
    dtype: Sequence[str],
    device: str,
) -> Iterator[Case]:
    """Every layer at every combination of the others, the smallest first; `dim` is the width of all heads."""
    known = files(layers.__name__)
    chosen = [pick("layers", name, known) for name in names or known]
    for kind, h, c, b, n, name in itertools.product(dtype, heads, dim, batch, sorted(tokens), chosen):
        about = {"layer": name, "tokens": n, "batch": b, "heads": h, "dim": c, "dtype": kind}
        forms = functools.partial(_forms, name, Shape(b, n, h, c), getattr(torch, kind), device)
        yield Case(about | {"device": device}, forms, yardstick="timm")


def _forms(name: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Form]:
    torch.manual_seed(shape.tokens)
    width, n = shape.dim, shape.tokens
    rows, columns = shape.grid()
    options: dict[str, Any] = {}
    if name == "soft" and rows == columns and rows % 7 == 0:
        options = {"ratio": rows // 7}
    layer = layers.mechanism(name)(width, shape.heads, device=device, **options)
    layer.set_input((rows, columns))
    cost, softmax = layer.flops(n), layers.mechanism("softmax")(width, shape.heads, device="meta").flops(n)
    x = torch.randn(shape.batch, n, width).to(device, dtype)
    timm = Attention(width, shape.heads).to(device, dtype)
    forms = {
        "sansmax": module_form(layer.to(dtype), x, shape.batch * cost),
        "timm": module_form(timm, x.detach().clone(), shape.batch * softmax),
    }
    if options and isinstance(layer, SOFT):
        forms["published"] = module_form(PublishedSOFT(layer), x.detach().clone(), shape.batch * cost)
    return forms

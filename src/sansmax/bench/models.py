"""Whole networks against timm's own, in evaluation or in training."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import nn

from .. import models
from .._find import pick
from ..models._create import trunks
from .cases import Case, Form, module_form
from .measure import count_flops

__all__ = ["NETWORKS", "network_cases", "twin"]

NETWORKS = (
    "sima_small_12_p16",
    "soft_tiny",
    "xvit_small_p16",
    "eamlp_14",
    "aft_conv_small_p16_k11_h384",
)
PLAIN = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


def network_cases(
    names: Sequence[str],
    *,
    mechanism: Sequence[str],
    against: Sequence[str],
    img_size: Sequence[int],
    batch: Sequence[int],
    dtype: Sequence[str],
    device: str,
) -> Iterator[Case]:
    """Every network at every combination of the others, the smallest first.

    Forms: "sansmax" and each network of timm in `against`, by default `twin`.
    """
    known = dict.fromkeys([*trunks(), *timm.list_models()])
    chosen = [_images(pick("networks", name, known)) for name in names or NETWORKS]
    others = [pick("timm's networks", name, timm.list_models()) for name in against]
    kinds = list(mechanism) or [None]
    for kind, b, size, name, mixer in itertools.product(dtype, batch, sorted(img_size), chosen, kinds):
        about = {"network": name, "mechanism": mixer, "img_size": size, "batch": b, "dtype": kind}
        rivals = others or [twin(name)]
        forms = functools.partial(_forms, name, mixer, rivals, size, b, getattr(torch, kind), device)
        yield Case(about | {"device": device}, forms, yardstick=rivals[0])


def _images(name: str) -> str:
    if name in models.networks() and timm.get_pretrained_cfg(name).input_size is None:  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError(f"networks: expected one that takes images, got {name}; use soft_tiny for example")
    return name


def twin(name: str) -> str:
    """The network of timm beside which a network stands: itself, its XCiT, or the DeiT nearest in parameters.

    Nearest is meant in the logarithm.
    """
    family, _, size = name.partition("_")
    if name not in models.networks():
        return name if timm.is_model(name) else PLAIN[1]
    if family == "sima" and timm.is_model(f"xcit_{size}_224"):
        return f"xcit_{size}_224"
    with torch.device("meta"):
        sizes = {n: math.log(_parameters(timm.create_model(n))) for n in (name, *PLAIN)}
    return min(PLAIN, key=lambda n: abs(sizes[n] - sizes[name]))


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _forms(
    name: str,
    mechanism: str | None,
    against: Sequence[str],
    size: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Form]:
    def built(make: Any, *words: Any) -> Form:
        torch.manual_seed(0)
        network = make(*words, img_size=size).to(device)
        flops = count_flops(network, torch.zeros(1, 3, size, size, device=device))
        x = torch.randn(batch, 3, size, size).to(device, dtype)
        return module_form(network.to(dtype), x, batch * flops)

    own = name in models.networks() or mechanism is not None or not timm.is_model(name)
    first = built(models.create_model, name, mechanism) if own else built(timm.create_model, name)
    return {"sansmax" if own else name: first} | {
        other: built(timm.create_model, other) for other in against if own or other != name
    }

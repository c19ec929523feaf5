"""State dicts of single layers as others have written them, in the names of sansmax.layers."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..layers import Mixer
from ..layers._contract import Grid

__all__ = ["EXTERNAL_MULTIHEAD", "join", "layer_state", "renamed", "square", "transposed"]

Names = Iterable[tuple[str, str]]

# multi_head_attention_torch.py of EANet, and EAMLP's blocks.
EXTERNAL_MULTIHEAD = (
    ("trans_dims.", "query."),
    ("linear_0.weight", "memory_k"),
    ("linear_0.bias", "memory_k_bias"),
    ("linear_1.weight", "memory_v"),
    ("linear_1.bias", "memory_v_bias"),
)
AFT = (("project.", "proj."), ("output.", "proj."))
NAMES: dict[str, Names] = {
    # EANet's module, and xmu-xiaoma666/External-Attention-pytorch.
    "ExternalAttention": (
        ("conv1.", "query."),
        ("linear_0.weight", "memory_k"),
        ("linear_1.weight", "memory_v"),
        ("conv2.0.", "proj."),
        ("conv2.1.", "bn."),
        ("mk.weight", "memory_k"),
        ("mv.weight", "memory_v"),
    ),
    "ExternalAttentionMultihead": EXTERNAL_MULTIHEAD,
    # SOFT, class SoftmaxFreeAttention.
    **dict.fromkeys(
        ("SOFT", "SOFTNorm"),
        (
            ("W_q.", "q."),
            ("W_v.", "v."),
            ("attn.Qlandmark_op.", "landmark."),
            ("attn.Qnorm_act.0.", "landmark_norm."),
            ("attn.conv.", "conv."),
            ("ff.", "proj."),
        ),
    ),
    # xmu-xiaoma666's UFOAttention.
    "XNorm": (("fc_o.", "proj."),),
    # rish-16/aft-pytorch, labml's AFTLocal, xmu-xiaoma666's AFT_FULL.
    "AFTSimple": AFT,
    **dict.fromkeys(
        ("AFTFull", "AFTLocal"),
        (*AFT, ("wbias", "bias"), ("pos_bias", "bias"), ("position_biases", "bias")),
    ),
}
# Queries, keys and values in three layers, which are one here.
THREE = (("fc_q", "fc_k", "fc_v"), ("to_q", "to_k", "to_v"), ("query", "key", "value"))


def renamed(key: str, names: Names) -> str:
    """`key` with the first of `names` that it begins with, or that stands behind a dot, replaced."""
    for theirs, ours in names:
        found = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{ours}", key)
        if found != key:
            return found
    return key


def join(state: dict[str, Tensor], keys: list[str], name: str) -> None:
    """Replaces the tensors of `keys` by one, `name`, with the rows of all, where they are there and fit."""
    parts = [state[key] for key in keys if key in state]
    kinds = {(t.shape[1:], t.device) if t.ndim else None for t in parts}
    if len(parts) == len(keys) and len(kinds) == 1 and None not in kinds:
        for key in keys:
            del state[key]
        state[name] = torch.cat(parts)


def transposed(t: Tensor) -> Tensor:
    """A matrix with rows for columns; what is none will be refused by its shape."""
    return t.mT if t.ndim == 2 else t


def square(patches: int) -> Grid | None:
    """The grid of a square image with so many patches."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None


def layer_state(layer: Mixer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published layer's state dict in the names and shapes of `layer`; our own passes as it is."""
    kind = type(layer).__name__
    parts = dict(state)
    for trio in THREE:
        for leaf in ("weight", "bias"):
            if hasattr(layer, "qkv"):
                join(parts, [f"{name}.{leaf}" for name in trio], f"qkv.{leaf}")
    if kind == "XNorm" and "fc_o.weight" in parts:
        warnings.warn(
            "XNorm: the checkpoint has the names of an unofficial UFO-ViT layer, which normalises K^T V over "
            "the other axis, so its outputs differ; fine-tune the weights",
            stacklevel=2,
        )
        if "gamma" in parts:
            parts["gamma"] = parts["gamma"].flatten()
    own = layer.state_dict()
    result = {}
    for key, value in parts.items():
        name = renamed(key, NAMES.get(kind, ()))
        if name != key and name in own:
            if own[name].ndim == 2 < value.ndim:
                value = value.flatten(1)  # 1x1 convolutions are linear layers here
            value = transposed(value) if name == "memory_v" else value
        result[name] = value
    # Masks and biases without an effect that the published layers keep beside their weights.
    for name in ("local_mask", "memory_k_bias"):
        if name not in own:
            result.pop(name, None)
    return result

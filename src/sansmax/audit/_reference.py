"""This package's layer with the parameters of the module under audit."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import layers
from ..layers import Mixer
from ._subject import Subject

__all__ = ["Unmapped", "mapped_reference", "plain_reference", "reference_backend"]


class Unmapped(Exception):
    """Why the parameters have no place in this package's layer."""


QUERY = ["q", "to_q", "query", "queries", "q_proj", "fc_q", "w_q", "wq", "q_linear", "linear_q", "query_proj"]
TRIO = {
    "q": QUERY,
    "k": [re.sub("query|queries", "key", name).replace("q", "k") for name in QUERY] + ["keys"],
    "v": [re.sub("query|queries", "value", name).replace("q", "v") for name in QUERY] + ["values"],
}
PROJ = [
    "proj",
    "to_out",
    "to_out.0",
    "out_proj",
    "out",
    "ff",
    "fc_o",
    "o_proj",
    "w_o",
    "wo",
    "output",
    "project",
    "fc_out",
    "c_proj",
    "proj_out",
    "linear_out",
    "out_linear",
    "conv2.0",
]
HEADS = {
    "qkv": ("qkv", "to_qkv", "qkv_proj", "wqkv", "in_proj", "c_attn", "query_key_value", "qkv_linear"),
    "kv": ("kv", "to_kv", "kv_proj", "wkv"),
    **TRIO,
    "proj": PROJ,
}
MEMORIES = {
    "query": (*QUERY, "conv1", "query_linear", "trans_dims", "in_proj"),
    "memory_k": ("memory_k", "mk", "m_k", "linear_0"),
    "memory_v": ("memory_v", "mv", "m_v", "linear_1"),
    "memory_v_bias": ("memory_v_bias",),
    "bn": ("bn", "conv2.1"),
    "proj": PROJ,
}
TABLE = {
    "bias": ("bias", "wbias", "pos_bias", "position_biases", "position_bias", "w"),
    "bias_u": ("bias_u", "u"),
    "bias_v": ("bias_v",),
}
SOFT = {
    "q": QUERY,
    "v": TRIO["v"],
    "landmark": ("landmark", "qlandmark_op"),
    "landmark_norm": ("landmark_norm", "qnorm_act.0"),
    "conv": ("conv",),
    "proj": PROJ,
}
# Our names of what a mechanism has, and what others call it; of one that is not here, its own names alone.
ROLES: dict[str, dict[str, Sequence[str]]] = {
    "softmax": HEADS,
    "sima": HEADS,
    "xnorm": {**HEADS, "gamma": ("gamma",)},
    "external": MEMORIES,
    "external_multihead": MEMORIES,
    "soft": SOFT,
    "soft_norm": SOFT,
    "aft_simple": HEADS,
    "aft_full": {**HEADS, **TABLE},
    "aft_local": {**HEADS, **TABLE},
    "aft_conv": {**HEADS, "w": ("w", "kernel"), "gamma": ("gamma",), "beta": ("beta",)},
}


def plain_reference(subject: Subject) -> Mixer:
    """This package's layer of the claimed mechanism with parameters of its own, biases at 0.

    Raises:
        ValueError, TypeError: it cannot have the module's width and heads.
    """
    mechanism = subject.settings.mechanism
    assert mechanism is not None
    words = {"num_heads": subject.heads, "proj_bias": False, **subject.settings.reference}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.settings.seed)
        layer = layers.mechanism(mechanism)(subject.dim, **words)
    return layer.to(subject.dtype).eval().requires_grad_(False)


def mapped_reference(subject: Subject, state: Mapping[str, Tensor]) -> Mixer:
    """The same with the parameters of `state`, which has the module's names.

    Raises:
        Unmapped: a parameter has no place there, or one is missing.
    """
    mechanism = subject.settings.mechanism
    assert mechanism is not None
    found = _joined(_renamed(mechanism, state))
    words = _words(subject, mechanism, found) | dict(subject.settings.reference)
    try:
        layer = layers.mechanism(mechanism)(subject.dim, **words).to(subject.dtype).eval()
    except (ValueError, TypeError) as error:
        raise Unmapped(str(error)) from None
    own = layer.state_dict()
    if names := sorted(own.keys() ^ found.keys()):
        what = "; ".join(
            f"{name} has no counterpart there" if name in found else f"{name} is missing" for name in names
        )
        raise Unmapped(f"{what}, in {type(layer).__name__} with {words}")
    for name, tensor in own.items():
        theirs = found[name]
        if tensor.numel() == theirs.numel() and (tensor.ndim <= 1 or theirs.ndim > tensor.ndim):
            theirs = theirs.reshape(tensor.shape)
        if theirs.shape != tensor.shape:
            raise Unmapped(f"{name} has shape {tuple(theirs.shape)}, expected {tuple(tensor.shape)}")
        found[name] = theirs
    layer.load_state_dict(found)
    return layer.requires_grad_(False)


@contextmanager
def reference_backend() -> Iterator[None]:
    """Every operator takes its literal body."""
    before = os.environ.get("SANSMAX_BACKEND")
    os.environ["SANSMAX_BACKEND"] = "reference"
    try:
        yield
    finally:
        del os.environ["SANSMAX_BACKEND"]
        if before is not None:
            os.environ["SANSMAX_BACKEND"] = before


def _renamed(mechanism: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In our names where one is known; what has none keeps its own."""
    roles = ROLES.get(mechanism, {})
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _ours(key, roles, state)
        if name in found:
            raise Unmapped(f"two parameters could be {name}, {key} is one")
        leaf = key.rpartition(".")[2]
        if name in ("memory_k.weight", "memory_v.weight"):  # a linear layer's, or a convolution's of width 1
            name, tensor = name.removesuffix(".weight"), tensor.flatten(1)
            tensor = tensor.mT if name == "memory_v" else tensor
        elif name == "memory_v.bias":
            name = "memory_v_bias"
        elif name == "memory_k.bias":
            continue  # one number for all tokens cancels in the softmax over them
        elif leaf == "weight" and tensor.ndim > 2 and name.split(".")[0] in {*HEADS, "query"}:
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found


def _ours(key: str, roles: Mapping[str, Sequence[str]], state: Mapping[str, Tensor]) -> str:
    if key.split(".")[0] in roles:
        return key
    for ours, names in roles.items():
        for name in names:
            own = re.escape(name)
            match = re.fullmatch(rf"(.+\.)?{own}", key, re.IGNORECASE)
            # A linear layer's bias is no table.
            if match and not (name == "bias" and f"{match[1] or ''}weight" in state):
                return ours
            if match := re.fullmatch(rf"(.+\.)?{own}(?:\.|_(?=weight|bias))(\w+)", key, re.IGNORECASE):
                return f"{ours}.{match[2]}"
    return key


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One `qkv` of q, k and v, or of q and kv; a missing bias among them is 0."""
    parts = [name for name in ("q", "k", "v", "kv") if f"{name}.weight" in state]
    if parts not in (["q", "k", "v"], ["q", "kv"]):
        return state
    weights = [state.pop(f"{name}.weight") for name in parts]
    biases = [state.pop(f"{name}.bias", None) for name in parts]
    state["qkv.weight"] = torch.cat(weights)
    if any(bias is not None for bias in biases):
        pairs = zip(weights, biases, strict=True)
        state["qkv.bias"] = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
    return state


def _words(subject: Subject, mechanism: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The words of this package's layer that the parameters tell."""
    front = next((name for name in ("qkv", "query", "q") if f"{name}.weight" in state), None)
    words: dict[str, Any] = {
        "num_heads": subject.heads,
        "qkv_bias": f"{front}.bias" in state,
        "proj_bias": "proj.bias" in state,
        "out_proj": "proj.weight" in state,
    }
    if mechanism in ("softmax", "sima", "xnorm") and "qkv.weight" in state:
        width = len(state["qkv.weight"]) // 3
        words |= {"attn_dim": width} if width != subject.dim else {}
    match mechanism:
        case "xnorm":
            words["gamma"] = "gamma" in state
        case "external":
            words |= {
                "query_proj": front is not None,
                "memory_bias": "memory_v_bias" in state,
                "block": "bn.weight" in state,
            }
        case "external_multihead" if "query.weight" in state:
            words["coef"] = len(state["query.weight"]) // subject.dim
            del words["out_proj"]
        case "soft" | "soft_norm":
            if "landmark.weight" in state and (stride := state["landmark.weight"].shape[-1]) > 1:
                words["ratio"] = stride
            else:
                words["landmarks"] = _told(subject, "landmarks", "num_landmarks")
            words["conv_size"] = state["conv.weight"].shape[-1] if "conv.weight" in state else None
        case "aft_full" | "aft_local":
            table = state.get("bias", state.get("bias_u"))
            if table is not None:
                words |= {
                    "max_tokens": len(table),
                    "factor_dim": None if "bias" in state else table.shape[1],
                }
            if mechanism == "aft_local":
                words["window"] = _told(subject, "window", "window_size", "local_window_size", "s")
        case "aft_conv" if "w" in state:
            words |= {
                "kernel_size": state["w"].shape[-1],
                "kernel_dims": state["w"].ndim - 1,
                "normalise": "gamma" in state,
            }
    if "memory_k" in state:
        words["memory"] = len(state["memory_k"])
    return words


def _told(subject: Subject, *names: str) -> Any:
    """A constructor's word under one of `names`, or the first of them in `reference`."""
    for words, known in ((subject.settings.reference, names[:1]), (subject.words, names)):
        for name in known:
            if name in words:
                return words[name]
    raise Unmapped(f"{names[0]} is not known; give it as JSON with --reference")

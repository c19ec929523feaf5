"""The softmax attentions whose place a mechanism can take, and what is known of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ..layers import Mixer
from ..layers._parts import HeadsMixer

__all__ = ["Source", "found", "read"]

KNOWN = (Attention, AttentionRope, EvaAttention)
# Of transformers, which need not be installed.
HUGGING_FACE = (
    "ViTAttention",
    "DeiTAttention",
    "Dinov2Attention",
    "Dinov2WithRegistersAttention",
    "DINOv3ViTAttention",
    "SiglipAttention",
    "Siglip2Attention",
)
PLACES = ("attn", "attention", "self_attn", "self_attention")  # names of modules that are none of them


@dataclass(frozen=True)
class Source:
    """An attention in a common form.

    Attributes:
        weight, bias: of Q, K and V, rows in this order: (3 * attn_dim, dim) and (3 * attn_dim,) or None.
        rotary: tokens in front that rotary positions leave out, None: those that the positions lack, and
            whether they rotate halves; None: it has no such positions.
        attn_drop, proj_drop: shares.
        called: whether it is called as transformers calls one.
    """

    module: Any
    dim: int
    num_heads: int
    head_dim: int
    weight: Tensor
    bias: Tensor | None
    rotary: tuple[int | None, bool] | None
    gate: nn.Module | None
    proj: nn.Linear
    attn_drop: float
    proj_drop: float
    called: bool = False


def found(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, why no mechanism can take its place) of everything that is an attention, "" where one
    can."""
    for name, module in model.named_modules():
        own = _known(module)
        if own or name.rpartition(".")[2] in PLACES or type(module).__name__.endswith("Attention"):
            inner = list(module.modules())[1:]
            if own or not any(map(_known, inner)):
                yield name, module, _refusal(module) if own else _unknown(module)


def _known(module: nn.Module) -> bool:
    return type(module) in KNOWN or isinstance(module, Mixer) or _hugging_face(module)


def _hugging_face(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in HUGGING_FACE and kind.__module__.startswith("transformers.")


def read(module: Any) -> Source:
    """An attention for which `found` knows no reason."""
    if _hugging_face(module):
        return _read_hugging_face(module)
    parts = {
        "proj": module.proj,
        "attn_drop": module.attn_drop.p if hasattr(module, "attn_drop") else 0.0,
        "proj_drop": module.proj_drop.p,
    }
    heads, width = module.num_heads, module.head_dim
    gate = getattr(module, "gate", None)
    if isinstance(module, Mixer) or type(module) is Attention:
        qkv = module.qkv
        return Source(module, qkv.in_features, heads, width, qkv.weight, qkv.bias, None, gate, **parts)
    rotary = (module.num_prefix_tokens, bool(getattr(module, "rotate_half", False)))
    if module.qkv is None:
        weight, bias = _joined(module, heads, width)
        dim = module.q_proj.in_features
    else:
        weight, bias, dim = module.qkv.weight, module.qkv.bias, module.qkv.in_features
        if getattr(module, "q_bias", None) is not None:
            bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    return Source(module, dim, heads, width, weight, bias, rotary, gate, **parts)


def _read_hugging_face(module: Any) -> Source:
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    weight, bias = _joined(module, heads, module.head_dim)
    return Source(
        module,
        module.q_proj.in_features,
        heads,
        module.head_dim,
        weight,
        bias,
        (None, True) if type(module).__name__.startswith("DINOv3") else None,
        None,
        module.o_proj if hasattr(module, "o_proj") else module.out_proj,
        float(getattr(module, "dropout", 0.0) or getattr(module, "attention_dropout", 0.0)),
        0.0,
        called=True,
    )


def _joined(module: Any, heads: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of three layers as of one."""
    parts = [module.q_proj, module.k_proj, module.v_proj]
    # Of fewer heads of keys than of queries, each serves a number of queries' heads in a row.
    weights, biases = zip(*(_by_head(part, heads, width) for part in parts), strict=True)
    known = [b for b in biases if b is not None]
    if not known:
        return torch.cat(weights), None
    return torch.cat(weights), torch.cat([torch.zeros_like(known[0]) if b is None else b for b in biases])


def _by_head(layer: nn.Linear, heads: int, width: int) -> tuple[Tensor, Tensor | None]:
    times = heads * width // layer.out_features
    weight = layer.weight.unflatten(0, (-1, width)).repeat_interleave(times, 0).flatten(0, 1)
    if layer.bias is None:
        return weight, None
    return weight, layer.bias.unflatten(0, (-1, width)).repeat_interleave(times, 0).flatten()


def _refusal(module: Any) -> str:
    if isinstance(module, Mixer):
        return "" if isinstance(module, HeadsMixer) else "its keys are no softmax attention's"
    source = read(module)
    if source.proj.out_features != source.dim:
        return "its output has another width than its input"
    return ""


def _unknown(module: nn.Module) -> str:
    names = {name.rpartition(".")[2] for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    kind = type(module).__name__
    biased = sorted(
        name for name in names if name.startswith(("rel_pos", "relative_position", "attention_b"))
    )
    if biased:
        return f"it adds a bias for every pair of positions to its scores ({biased[0]}), which others lack"
    if "Window" in kind:
        return "it attends in windows, whose number of tokens is small and fixed"
    return f"{kind} is none of timm's Attention, AttentionRope and EvaAttention, whose parts are known"

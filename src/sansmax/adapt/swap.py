"""Another attention in a network that exists, with the weights that both have."""

import copy
import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ..layers._parts import HeadsMixer
from ..models._vit import GridBlock, ViT
from ._sources import Source, found, read
from .transformers import Called

__all__ = ["Report", "Swapped", "swap"]

PREFIX = (
    "cls_token",
    "distillation_token",
    "register_tokens",
)  # parameters of tokens in front of the patches


@dataclass(frozen=True)
class Swapped:
    """One layer.

    Attributes:
        copied: the new layer's parameters that hold the old one's weights.
        fresh: those that begin at random.
    """

    name: str
    before: nn.Module
    after: Mixer
    copied: list[str]
    fresh: list[str]


@dataclass
class Report:
    """What `swap` did.

    Attributes:
        mechanism: a file name of sansmax.layers.
        swapped: layers that were replaced, in the network's order.
        already: names of layers that are of this mechanism.
        left: names of layers that were not asked for.
        refused: (name, reason) of attentions whose place the mechanism cannot take.
    """

    mechanism: str
    swapped: list[Swapped] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    _model: Any = None
    _classes: list[tuple[nn.Module, type, type]] = field(default_factory=list)

    def undo(self) -> nn.Module:
        """Puts the old layers back, with the weights that they had; the network."""
        return self._put("before")

    def redo(self) -> nn.Module:
        """Puts the new layers in again, with the weights that they have by now; the network."""
        return self._put("after")

    def only(self, names: Collection[str]) -> nn.Module:
        """Puts the new layers of these names in, and the old ones everywhere else; the network."""
        self.redo()
        for one in self.swapped:
            if one.name not in names:
                self._model.set_submodule(one.name, one.before)
        return self._model

    def leave(self, names: Collection[str]) -> nn.Module:
        """Puts the old layers of these names back for good, the new ones in elsewhere; the network."""
        model = self.only({one.name for one in self.swapped} - set(names))
        self.left += [one.name for one in self.swapped if one.name in names]
        self.swapped = [one for one in self.swapped if one.name not in names]
        return model

    def _put(self, which: str) -> nn.Module:
        for one in self.swapped:
            self._model.set_submodule(one.name, getattr(one, which))
        for module, old, new in self._classes:
            module.__class__ = old if which == "before" else new
        return self._model

    def __str__(self) -> str:
        lines = [
            f"{one.name}: {type(one.before).__name__} -> {type(one.after).__name__}, kept "
            f"{', '.join(one.copied) or 'nothing'}; new {', '.join(one.fresh) or 'nothing'}"
            for one in self.swapped
        ]
        lines += [f"{name}: {self.mechanism} already" for name in self.already]
        lines += [f"{name}: left as it is" for name in self.left]
        lines += [f"{name}: cannot be replaced, because {reason}" for name, reason in self.refused]
        return "\n".join(lines)


def swap(
    model: nn.Module,
    mechanism: str,
    layers: str | int | Sequence[str | int] | None = None,
    mechanism_args: dict[str, Any] | None = None,
) -> tuple[nn.Module, Report]:
    """Replaces softmax attention by another mechanism, in place.

    Attentions are timm's Attention, AttentionRope and EvaAttention (ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP,
    EVA and the like), those of ViT, DeiT, DINOv2, DINOv3 and SigLIP in Hugging Face's transformers, and
    sansmax's own softmax, sima and xnorm. The function changes with the mechanism: the
    network has to learn again. Weights of queries, keys, values and `proj`, norms of queries and keys, a gate
    and dropout are kept where the new layer has them; rotary positions turn its queries and keys.

    Args:
        model: a network.
        mechanism: a file name of sansmax.layers. "softmax" turns sima and xnorm back, with the weights they
            have by now.
        layers: which: patterns of names as "blocks.*.attn", or numbers in the network's order, negative ones
            from the last; None: all.
        mechanism_args: the layer's own options.

    Returns:
        `model`, and a report: what was replaced, kept, begun anew and refused. report.undo() takes it back.

    Raises:
        ValueError: there is nothing to replace; the text tells the reason of every attention.
    """
    layer = _layer(mechanism)
    attentions = list(found(model))
    wanted = _wanted([name for name, _, _ in attentions], layers)
    report = Report(mechanism, _model=model)
    made: list[Swapped] = []
    for name, module, reason in attentions:
        if isinstance(module, layer):
            report.already.append(name)
        elif name not in wanted:
            report.left.append(name)
        elif reason:
            report.refused.append((name, reason))
        else:
            try:
                made.append(_replacement(model, name, read(module), layer, mechanism_args or {}))
            except _Unfit as why:
                report.refused.append((name, str(why)))
    if not made and not report.already:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.refused) or "no attention at all"
        raise ValueError(
            f"swap: expected attention that {mechanism} can take the place of in {type(model).__name__}, got "
            f"{reasons}; choose another network or mechanism"
        )
    report.swapped = made
    report._classes = _grid_tellers(model) if layer.traits.needs and made else []
    return report.redo(), report


class _Unfit(Exception):
    """Why one attention cannot be replaced."""


def _layer(mechanism: str) -> type[Mixer]:
    return layers.mechanism(mechanism)


def _wanted(names: list[str], chosen: str | int | Sequence[str | int] | None) -> set[str]:
    if chosen is None:
        return set(names)
    wanted: set[str] = set()
    for one in [chosen] if isinstance(chosen, str | int) else chosen:
        if isinstance(one, int) and -len(names) <= one < len(names):
            fits = [names[one]]
        else:
            fits = fnmatch.filter(names, str(one))
        if not fits:
            raise ValueError(
                f"layers: expected numbers below {len(names)} or patterns of {', '.join(names) or 'none'}, "
                f"got {one!r}; choose among them"
            )
        wanted |= set(fits)
    return wanted


def _replacement(
    model: nn.Module, name: str, source: Source, layer: type[Mixer], options: dict[str, Any]
) -> Swapped:
    own, width = source.module, source.num_heads * source.head_dim
    heads = issubclass(layer, HeadsMixer)
    turned = source.rotary is not None
    if not heads:
        for reason in (
            turned and "rotary positions turn queries and keys, of which it has none; use sima or xnorm",
            source.gate is not None and "it has no place for the gate behind the heads; use sima or xnorm",
            width != source.dim
            and f"its attention is {width} wide, the tokens {source.dim}; use sima or xnorm",
        ):
            if reason:
                raise _Unfit(reason)
    words: dict[str, Any] = {"attn_dim": width} if heads and width != source.dim else {}
    if layer.attention_map:
        words["attn_drop"] = source.attn_drop
    words |= {"device": source.weight.device, "dtype": source.weight.dtype}
    kind = layer
    if heads and (turned or source.gate is not None):
        kind = _before(Turning, kind)
    if source.called:
        kind = _before(Called, kind)
    after = kind(
        source.dim,
        source.num_heads,
        qkv_bias=source.bias is not None,
        proj_bias=source.proj.bias is not None,
        proj_drop=source.proj_drop,
        **words,
        **options,
    )
    if isinstance(after, Turning):
        after.rotary, after.gate = source.rotary, copy.deepcopy(source.gate)
    if layer.traits.needs:
        after.set_input(*_grid(model, name))
        after.reset_parameters()
    after.train(own.training)
    copied = _copied(source, after)
    fresh = [key for key, _ in after.named_parameters() if key not in copied]
    return Swapped(name, own, after, copied, fresh)


def _copied(source: Source, after: Mixer) -> list[str]:
    """Names of the parameters that were filled."""
    own = source.module
    for key in ("q_norm", "k_norm", "norm"):
        given = getattr(own, key, nn.Identity())
        if isinstance(given, nn.Identity):
            continue
        if key != "norm" and key not in after.head_norms:
            continue
        setattr(after, key, copy.deepcopy(given))
    state = dict(after.named_parameters())
    rows = {"q": 0, "k": 1, "v": 2}
    parts = source.weight.chunk(3), source.bias.chunk(3) if source.bias is not None else (None,) * 3
    values: dict[str, Tensor | None] = {
        "qkv.weight": source.weight,
        "qkv.bias": source.bias,
        "proj.weight": source.proj.weight,
        "proj.bias": source.proj.bias,
    }
    for key, row in rows.items():
        values |= {f"{key}.weight": parts[0][row], f"{key}.bias": parts[1][row]}
    values["query.weight"], values["query.bias"] = parts[0][0], parts[1][0]
    copied = []
    with torch.no_grad():
        for key, value in values.items():
            if value is not None and key in state and state[key].shape == value.shape:
                state[key].copy_(value)
                copied.append(key)
    whole = tuple(f"{key}." for key in ("q_norm", "k_norm", "norm", "gate"))
    return copied + [key for key in state if key.startswith(whole)]


def _grid(model: nn.Module, name: str) -> tuple[Grid, int]:
    """The grid of patches and the tokens in front of it, as the nearest network around the layer tells."""
    parts = name.split(".")
    outwards = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1)]
    for around in outwards:
        grid = getattr(getattr(around, "patch_embed", None), "grid_size", None)
        if grid:
            return (int(grid[0]), int(grid[1])), int(getattr(around, "num_prefix_tokens", 0))
    for around in reversed(
        outwards
    ):  # of transformers: the whole network of images holds the tokens in front
        config = getattr(around, "config", None)
        image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if isinstance(image, int) and isinstance(patch, int):
            prefix = [p.shape[1] for key, p in around.named_parameters() if key.rpartition(".")[2] in PREFIX]
            return (image // patch, image // patch), sum(prefix)
    raise _Unfit(
        "it needs a grid of tokens, and the network around it tells none (patch_embed.grid_size, or "
        "image_size and patch_size of its config)"
    )


def _grid_tellers(model: nn.Module) -> list[tuple[nn.Module, type, type]]:
    """timm's vision transformers and their blocks, what they are, and what tells their layers the grid of
    every image."""
    changed: list[tuple[nn.Module, type, type]] = []
    for module in model.modules():
        if type(module) is VisionTransformer and all(type(block) is Block for block in module.blocks):
            changed.append((module, VisionTransformer, ViT))
            changed += [(block, Block, GridBlock) for block in module.blocks]
    return changed


class Turning(HeadsMixer):
    """With rotary positions and a gate behind the heads, as timm's AttentionRope and EvaAttention have them:
    queries and keys behind the prefix tokens are turned, and the heads' output, normalised, is multiplied by
    sigmoid(gate(x))."""

    rotary: tuple[int | None, bool] | None = None
    gate: nn.Module | None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        if self.rotary is None:  # called as Attention is: x, attn_mask, is_causal
            rope, attn_mask = None, rope if attn_mask is None else attn_mask
        x, context, mask = self.received(x, attn_mask, is_causal, context, mask)
        q, k, v = self.heads(x, context)
        if rope is not None and self.rotary is not None:
            prefix, half = self.rotary
            if prefix is None:
                prefix = q.shape[2] - rope.shape[-2]
            q, k = (
                torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], 2).to(
                    v.dtype
                )
                for t in (q, k)
            )
        y = self.norm(self.attend(q, k, v, mask, is_causal).transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


def _before(first: Any, layer: type[Mixer]) -> type[Mixer]:
    """A class of the layer's name whose methods are those of `first`, where it has them."""
    return type(layer.__name__, (first, layer), {"__module__": __name__})

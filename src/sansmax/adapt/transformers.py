"""Mechanisms without parameters as attention functions of Hugging Face's transformers.

    import sansmax, transformers

    sansmax.register_transformers()
    model = transformers.AutoModel.from_pretrained("...", attn_implementation="sansmax:sima")

The queries, keys and values are the network's own, rotary positions included; the function is another, so
weights that learned with softmax have to learn again. Where a mechanism has parameters, sansmax.swap puts a
module in.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.aft.simple import aft_simple
from ..ops.sima import sima
from ..ops.xnorm import xnorm

__all__ = ["Called", "padding", "register_transformers"]

# What an attention function of transformers may be given and these cannot follow.
UNKNOWN = ("position_bias", "softcap", "sliding_window", "s_aux", "head_mask")
_warned: set[str] = set()


def _aft_simple(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Heads as channels; widths of queries, keys and values are equal."""
    flat = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    return aft_simple(*flat, mask=mask, causal=causal).unflatten(2, (q.shape[1], -1)).transpose(1, 2)


FUNCTIONS = {
    "sima": lambda q, k, v, mask, causal: sima(q, k, v, mask=mask, causal=causal),
    "xnorm": lambda q, k, v, mask, causal: xnorm(q, k, v, mask=mask, causal=causal),
    "aft_simple": _aft_simple,
}


def register_transformers() -> list[str]:
    """Makes attn_implementation="sansmax:sima", "sansmax:xnorm" and "sansmax:aft_simple" known to
    transformers, each with the function that gives it masks: padding, full or causal.

    Returns:
        The names.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ValueError(
            f"transformers: expected the package to be installed, got {error}; pip install sansmax[hf]"
        ) from None
    names = {f"sansmax:{name}": name for name in FUNCTIONS}
    for known, name in names.items():
        AttentionInterface.register(known, partial(_attention, name))
        AttentionMaskInterface.register(known, partial(_key_mask, name))
    return list(names)


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **words: Any,
) -> tuple[Tensor, None]:
    """(B, H, N, D) -> (B, N, H, D), and no map. `scaling` is softmax's; the functions have their own."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"sansmax:{name} is another function than softmax attention: weights that learned with softmax "
            "have to learn again, for example with sansmax.adapt.distil",
            stacklevel=2,
        )
    given = [word for word in UNKNOWN if words.get(word) is not None]
    if given or dropout:
        what = given[0] if given else f"attention dropout of {dropout:g}"
        raise ValueError(
            f"sansmax:{name}: expected attention without {what}, which it cannot follow, got it from "
            f"{type(module).__name__}; change the configuration, or use sdpa"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check_lengths(name, query.shape[2], key.shape[2], causal)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    mask = padding(attention_mask, key.shape[2], f"sansmax:{name}", causal)
    out = FUNCTIONS[name](query, key, value, mask, causal)
    return out.transpose(1, 2).contiguous(), None


def _check_lengths(name: str, queries: int, keys: int, causal: bool) -> None:
    if queries != keys and (causal or name == "aft_simple"):
        raise ValueError(
            f"sansmax:{name}: expected as many keys as queries, got {keys} and {queries}; set "
            "use_cache=False, because it keeps no cache of keys"
        )


def _key_mask(
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """(B, keys) bool, True = keep, or None where every token counts."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError(
            f"sansmax:{name}: expected full or causal attention, got a mask of its own for every query "
            f"({getattr(mask_function, '__qualname__', mask_function)}); use sdpa"
        )
    _check_lengths(name, q_length, kv_length, mask_function is causal_mask_function)
    return None if attention_mask is None else attention_mask[:, :kv_length].bool()


def padding(mask: Tensor | None, keys: int, name: str, causal: bool = False) -> Tensor | None:
    """A key mask (B, keys), True = keep, of what transformers hands to an attention: that already, or
    (B, heads, queries, keys), bool or with 0 where a key is kept.

    Raises:
        ValueError: queries have different masks.
    """
    if mask is None or mask.ndim == 2:
        return mask if mask is None else mask.bool()
    kept = mask if mask.dtype == torch.bool else mask == 0
    last = kept[:, 0, -1, :keys]
    wanted = last[:, None, None].expand_as(kept[..., :keys])
    if causal:
        wanted = wanted & wanted.new_ones(kept.shape[2], keys).tril()
    if not torch.equal(kept[..., :keys], wanted):
        raise ValueError(
            f"{name}: expected a mask of padded tokens, the same for every query, got one of shape "
            f"{tuple(mask.shape)} whose queries differ; use sdpa"
        )
    return last


class Called(nn.Module):
    """In front of a layer's class: it is called, and answers, as an attention of transformers."""

    name: str

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """position_embeddings: cosines and sines (patches, head width), in halves."""
        words: dict[str, Any] = {"mask": padding(attention_mask, hidden_states.shape[1], self.name)}
        if position_embeddings is not None:
            cosines, sines = position_embeddings
            words["rope"] = torch.cat([sines, cosines], -1)
        return super().forward(hidden_states, **words), None

"""Checkpoints of the authors, with their own key names, into our networks."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ..layers import Mixer
from ._layouts import layer_state

__all__ = ["begin_with", "fill", "load_published", "own_state"]

# What wraps a state dict in the authors' files. A network names what goes before these
# (`published_wrappers`).
WRAPPERS = ("model", "state_dict", "net", "model_state_dict", "state_dict_ema", "model_ema")
# What DataParallel and torch.compile put in front of every key.
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 3


def load_published(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> nn.Module:
    """Loads published weights into `model`, in place and strictly, and returns it.

    Args:
        model: a network of sansmax.models, whose class may rename keys (`published_state`), or one layer of
            sansmax.layers, with the names of the published modules and of their best-known ports; also
            behind torch.compile or DataParallel.
        checkpoint: a file (.pth, .pt, .bin, .safetensors) or a state dict, bare or inside "model",
            "state_dict" or "net" (for SOFT "state_dict_ema", the weights that its authors evaluated), with
            the published key names or with our own. The prefixes "module." and "_orig_mod." are dropped.
            Files are read with weights_only: argparse.Namespace, which several authors saved beside the
            weights, is the one object that may be in them, and nothing in a file is executed.

    Raises:
        OSError, ValueError: there is no such file, it may not be read, it is damaged or holds other objects,
            or keys or shapes do not fit; the first of them are named. The model keeps its weights then.
    """
    network = unwrap_model(model)
    name = type(network).__name__ if isinstance(checkpoint, Mapping) else str(checkpoint)
    fill(network, own_state(network, checkpoint), name)
    return model


def own_state(network: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint with our key names, as far as they are known."""
    wrappers = (*getattr(network, "published_wrappers", ()), *WRAPPERS)
    if isinstance(checkpoint, Mapping):
        state = _state_dict(checkpoint, wrappers, "the dict")
    else:
        state = _state_dict(_read(os.path.expanduser(checkpoint)), wrappers, str(checkpoint))
    if isinstance(network, Mixer):
        return layer_state(network, state)
    rename = getattr(network, "published_state", None)
    return state if rename is None else rename(state)


def fill(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copies a state dict with our key names into the network, or refuses all of it."""
    own = network.state_dict()
    if any(t.is_meta for t in own.values()):
        raise ValueError(
            f"checkpoint: expected a network with memory for the weights in {name}, got one on the meta "
            f"device; build it on another device"
        )
    _check_fits(own, state, name)
    # A tensor of the network under another name would be overwritten before its turn.
    storages = {t.untyped_storage().data_ptr() for t in own.values()}
    fitting = {
        key: (t.clone() if t.untyped_storage().data_ptr() in storages else t).reshape(own[key].shape)
        for key, t in state.items()
    }
    network.load_state_dict(fitting, strict=True)


def begin_with(network: nn.Module, inner: nn.Module, what: str, last: tuple[str, ...]) -> None:
    """The weights of a run's folder or of a file, which are those of all of the network or of its part
    `inner` alone. What has one of `last` in its name and another shape there stays as it was built.

    Raises:
        ValueError, OSError: they are not there, or are another network's.
    """
    path = Path(what).expanduser()
    names = ("best.safetensors", "weights.safetensors")
    path = next((path / name for name in names if (path / name).is_file()), path)
    state, own = own_state(network, path), network.state_dict()
    if own.keys() <= state.keys():
        kept = {k for k in own if any(part in k for part in last) and state[k].shape != own[k].shape}
        fill(network, {**state, **{key: own[key] for key in kept}}, str(path))
        return
    inner = getattr(inner, "model", inner)
    own = inner.state_dict()
    fill(inner, {key: value for key, value in own_state(inner, path).items() if key in own}, str(path))


def _read(path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, got none; check the path")
    if not os.access(path, os.R_OK):  # to safetensors, such a file does not exist
        raise PermissionError(
            f"checkpoint: expected to be allowed to read {path}, got no permission; change its rights"
        )
    try:
        if path.lower().endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own kinds of damage
        if other := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint: expected tensors alone in {path}, got {other[1]} too, which torch's "
                f"weights_only reader refuses; save the state dict again with "
                f"torch.save(model.state_dict(), path)"
            ) from None
        # torch's advice goes on for lines, and is to read the file without weights_only.
        lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        reason = ": ".join([type(error).__name__, *(line.partition(". ")[0] for line in lines[:1])])
        raise ValueError(
            f"checkpoint: expected a readable checkpoint at {path}, got {reason}; the file may be cut off, "
            f"fetch it again"
        ) from None


def _state_dict(content: Any, wrappers: tuple[str, ...], name: str) -> dict[str, Tensor]:
    for _ in wrappers:
        inner = (content.get(wrapper) for wrapper in wrappers) if isinstance(content, Mapping) else ()
        content = next((found for found in inner if isinstance(found, Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        other = "nothing" if isinstance(content, Mapping) else type(content).__name__
    else:
        keys = [key for key, t in content.items() if not (isinstance(key, str) and _is_dense(t))]
        other = f"other things under {len(keys)} of {len(content)} keys ({_first(keys)})" if keys else ""
    if other:
        raise ValueError(
            f"checkpoint: expected a state dict of tensors in {name}, bare or under one of "
            f"{', '.join(wrappers)}, got {other}; pass the dict of tensors itself"
        )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in content)), ""):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _is_dense(t: Any) -> bool:
    if not isinstance(t, Tensor) or t.layout != torch.strided:
        return False
    return not (t.is_quantized or t.is_nested)


def _first(keys: list[Any]) -> str:
    return ", ".join([*map(str, keys[:SHOWN]), *(["..."] if len(keys) > SHOWN else [])])


def _check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    shared = [(key, state[key], t) for key, t in own.items() if key in state]
    found = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(got.shape)} for {tuple(want.shape)}"
            for key, got, want in shared
            if got.squeeze().shape != want.squeeze().shape
        ],
        "of another dtype": [
            f"{key} {got.dtype} for {want.dtype}"
            for key, got, want in shared
            if want.is_floating_point() and not got.is_floating_point()
        ],
        "without content": [key for key, got, _ in shared if got.is_meta],
    }
    if any(found.values()):
        got = "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in found.items() if keys)
        raise ValueError(
            f"checkpoint: expected the {len(own)} keys of the network in {name}, got {got}; "
            f"build the network that the checkpoint was made for, with its number of classes"
        )

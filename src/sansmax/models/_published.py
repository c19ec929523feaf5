"""Checkpoints of the authors, with their own key names, into our networks."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..layers import Mixer
from ._layouts import layer_state

__all__ = ["load_published", "read_state"]

# What wraps a state dict in the authors' files. A network names what goes before these
# (`published_wrappers`).
WRAPPERS = ("model", "state_dict", "net", "model_state_dict", "state_dict_ema")
SHOWN = 3


def load_published(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> nn.Module:
    """Loads published weights into `model`, in place and strictly, and returns it.

    Args:
        model: a network of sansmax.models, whose class may rename keys (`published_state`), or one layer of
            sansmax.layers, with the names of the published modules and of their best-known ports.
        checkpoint: a file (.pth, .pt, .bin, .safetensors) or a state dict, bare or inside "model",
            "state_dict" or "net" (for SOFT "state_dict_ema", the weights that its authors evaluated), with
            the published key names or with our own. A prefix "module." is dropped. Files are read with
            weights_only: argparse.Namespace, which several authors saved beside the weights, is the one
                object that may be in them, and nothing in a file is executed.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is damaged or holds other objects, or keys or
            shapes do not fit; the first of them are named. The model keeps its weights then.
    """
    name = type(model).__name__ if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = read_state(checkpoint, getattr(model, "published_wrappers", ()))
    if isinstance(model, Mixer):
        state = layer_state(model, state)
    elif (rename := getattr(model, "published_state", None)) is not None:
        state = rename(state)
    own = model.state_dict()
    _check_fits(own, state, name)
    model.load_state_dict(state, strict=True)
    return model


def read_state(checkpoint: str | Path | Mapping[str, Any], first: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of a checkpoint with its own key names; wrappers `first` go before WRAPPERS."""
    if isinstance(checkpoint, Mapping):
        return _state_dict(checkpoint, (*first, *WRAPPERS), "the dict")
    return _state_dict(_read(Path(checkpoint).expanduser()), (*first, *WRAPPERS), str(checkpoint))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, got none; check the path")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"checkpoint: expected tensors alone in {path}, got a file that torch's weights_only reader "
            f"refuses ({reason}); save its state dict again with torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # every reader has its own kinds of damage
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"checkpoint: expected a readable checkpoint at {path}, got {reason}; the file may be cut off, "
            f"fetch it again"
        ) from None


def _state_dict(content: Any, wrappers: tuple[str, ...], name: str) -> dict[str, Tensor]:
    for wrapper in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        got = (
            f"keys {', '.join(map(str, list(content)[:SHOWN]))}"
            if isinstance(content, Mapping)
            else type(content)
        )
        raise ValueError(
            f"checkpoint: expected a state dict of tensors in {name}, bare or under one of "
            f"{', '.join(wrappers)}, got {got}; pass the dict of tensors itself"
        )
    prefix = "module."
    if all(key.startswith(prefix) for key in content):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    other = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].squeeze().shape != own[key].squeeze().shape
    ]
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if keys
    ]
    if found:
        raise ValueError(
            f"checkpoint: expected the {len(own)} keys of the network in {name}, got {'; '.join(found)}; "
            f"build the network that the checkpoint was made for, with its number of classes"
        )

"""Published networks in timm's registry, from a table of their sizes."""

import sys
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .._find import names

__all__ = ["networks", "register", "registered"]


PYRAMID = "_pyramid"


def networks() -> list[str]:
    """The names of the published networks, by family and then as their files list them.

    Those of one stride are registered in a second form too, with features of four: `<name>_pyramid`.
    """
    return [name for name in registered() if not name.endswith(PYRAMID)]


def registered() -> list[str]:
    """The same in both forms, and the softmax twins of the second."""
    files = [sys.modules[f"{__package__}.{file}"] for file in names(__package__ or "")]
    return [name for file in files for name in getattr(file, "default_cfgs", {})]


def register(
    module: str,
    cls: type[nn.Module],
    networks: dict[str, dict[str, Any]],
    *,
    source: str,
    pyramid: type[nn.Module] | None = None,
    out_indices: int = 3,
    **cfg: Any,
) -> None:
    """Makes an entrypoint of timm for every network of a file.

    Args:
        module: the file's __name__.
        cls: the trunk; it is built with the network's words, and with those of the caller on top.
        networks: name -> words.
        source: where the sizes are published; the entrypoint's docstring.
        pyramid: the trunk with features of four strides, registered as `<name>_pyramid`.
        out_indices: what features_only gives unless the caller says otherwise: the last so many.
        **cfg: timm's pretrained_cfg, in place of 224 px, crop 1.0, bicubic, ImageNet's mean and deviation.
    """
    if pyramid is not None:
        register(
            module,
            pyramid,
            {name + PYRAMID: words for name, words in networks.items()},
            source=f"{source} Features with strides 4, 8, 16 and 32.",
            out_indices=4,
            **cfg,
        )
    common = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
    }
    own: Any = sys.modules[module]
    known = getattr(own, "default_cfgs", {})
    own.default_cfgs = known | generate_default_cfgs(dict.fromkeys(networks, common | cfg))
    for name, words in networks.items():
        entrypoint = _entrypoint(name, cls, words, out_indices)
        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = module
        entrypoint.__doc__ = f"{name}: {words}. {source}"
        setattr(own, name, register_model(entrypoint))


def _entrypoint(name: str, cls: type[nn.Module], words: dict[str, Any], out_indices: int):
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"{name}: pretrained must be False because no weights are hosted for it, got True; build the "
                f"network and load a file with sansmax.load_published(model, path)"
            )
        arguments = {**words, **kwargs}
        if arguments.get("mechanism") == words.get("mechanism"):
            options = {**words.get("mechanism_args", {}), **(kwargs.get("mechanism_args") or {})}
        else:
            options = kwargs.get("mechanism_args") or {}
        arguments["mechanism_args"] = options
        indices = arguments.pop("out_indices", out_indices)
        return build_model_with_cfg(
            cls, name, False, feature_cfg={"out_indices": indices, "feature_cls": "getter"}, **arguments
        )

    return entrypoint

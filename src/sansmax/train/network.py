"""A trained network from what a user calls it: a run folder, a file, name=checkpoint, or a name of timm."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from .. import models
from .._find import pick
from ..adapt.swap import swap as replaced
from ..models._create import trunks
from ..models._published import fill, own_state
from ..tasks._data._decode import middle
from ..tasks._data.device import pick_device

__all__ = ["Network", "at_size", "build", "enough_memory", "load_network", "named", "pick_device"]

WEIGHTS = ("best.safetensors", "weights.safetensors")


@dataclass(frozen=True)
class Network:
    """A network in eval mode on the CPU, and how images become its input.

    Attributes:
        classes: names by index, or None where they are not known.
        img_size: side of the images it is given.
        crop: share of the resized side that is kept.
        mean, std: of each channel, for pixels 0..1.
        made: model, mechanism and model_args, the words that a recipe has for it.
        fingerprint: of the weights, as they were before positions were resampled.
    """

    model: nn.Module
    name: str
    classes: list[str] | None
    img_size: int
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_chans: int
    made: dict[str, Any]
    fingerprint: str = ""

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0: it has none, and gives features."""
        model: Any = self.model
        return model.num_classes

    def labels(self) -> list[str]:
        """A name for every class: its own, the synset where their number is ImageNet's, else the index."""
        subset = None if self.classes else infer_imagenet_subset(self.model)
        return self.classes or (
            ImageNetInfo(subset).label_names() if subset else list(map(str, range(self.num_classes)))
        )

    def transform(self, crop: float | None = None) -> Callable[[Image.Image], Tensor]:
        """RGB image -> normalised (in_chans, img_size, img_size); timm's evaluation transform."""
        make: Any = create_transform(
            (self.in_chans, self.img_size, self.img_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=crop or self.crop,
        )
        make.transforms.insert(0, middle)
        return make if self.in_chans == 3 else Compose([Grayscale(), make])

    def with_outputs_of(self, module: nn.Module) -> "Network":
        """Another form of the same network (a graph of it) in its place."""
        return replace(self, model=_StandIn(module, self.num_classes))


class _StandIn(nn.Module):
    """The outputs of a module under the name of a network."""

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.module, self.num_classes = module, num_classes

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)


def load_network(
    what: str, *, img_size: int | None = None, num_classes: int | None = None, untrained: bool = False
) -> Network:
    """The network that `what` names, with its weights.

    Args:
        what: a run folder (its best weights); a .safetensors file of a run or of `sansmax convert`;
            name=checkpoint, a network of sansmax or timm and a file for it; or a name of timm whose weights
            timm fetches.
        img_size: side of the images it will be given; None: those it was trained with. Positions are
            resampled.
        num_classes: that it must have.
        untrained: `what` is a name alone, and the weights are random.

    Raises:
        ValueError, OSError: there is no such thing, it does not fit, or it does not classify images of that
            size; one sentence says what to do.
    """
    path = Path(what).expanduser()
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    before, is_pair, behind = what.partition("=")
    if untrained:
        network = _untrained(_known(what))
    elif file.is_file():
        metadata = _metadata(file)
        network = _of_run(file, metadata) if "classes" in metadata else _of_file(metadata["model"], file)
    elif path.is_dir() and not timm.is_model(what):
        raise FileNotFoundError(
            f"network: expected {' or '.join(WEIGHTS)} in {path}, got neither; give the folder of a run that "
            f"finished an epoch"
        )
    elif is_pair:
        network = _of_file(_known(before), Path(behind).expanduser())
    elif os.sep in what or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise FileNotFoundError(
            f"network: expected a run folder or a file at {path}, got nothing; check the path"
        )
    else:
        network = _of_timm(_known(what))
    if num_classes is not None and network.num_classes != num_classes:
        raise ValueError(
            f"network: expected one with {num_classes} classes, got {network.name} with "
            f"{network.num_classes}; give another"
        )
    network = replace(network, fingerprint=_fingerprint(network.model))
    return at_size(network, img_size or network.img_size)


def build(
    name: str,
    mechanism: str | None = None,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    swap: Sequence[dict[str, Any]] = (),
    **words: Any,
) -> nn.Module:
    """A network of sansmax.create_model, or, where that has no such trunk, of timm; random weights.

    None leaves a word to the network. Each of `swap` holds words of sansmax.swap (mechanism, layers,
    mechanism_args), which then replaces attentions.
    """
    words |= {"num_classes": num_classes, "in_chans": in_chans}
    words = {key: value for key, value in words.items() if value is not None}
    own = mechanism is not None or name.partition(".")[0] in trunks()
    # timm's convolutional networks take any size and no such word.
    if img_size is not None and (own or timm.get_pretrained_cfg(name).fixed_input_size):  # pyright: ignore[reportOptionalMemberAccess]
        words["img_size"] = img_size
    model = models.create_model(name, mechanism, **words) if own else timm.create_model(name, **words)
    for one in swap:
        replaced(model, **one)
    return model


@contextlib.contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """A GPU whose memory does not suffice is told in a sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"batch_size: expected batches that fit into the GPU's memory, got {batch_size} images; use "
            f"--batch-size {max(1, batch_size // 2)}"
        ) from None


def _known(name: str) -> str:
    """A name of timm's registry, where this package's are too; else a ValueError with the nearest."""
    architecture, dot, tag = name.partition(".")
    name = pick("networks", architecture, timm.list_models()) + dot + tag
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        pick(f"weights of {architecture}", tag, tags)
    return name


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
    except Exception as error:
        raise ValueError(
            f"network: expected a .safetensors file that can be read at {file}, got "
            f"{' '.join(str(error).split())}; give name={file}, or fetch it again if it is cut off"
        ) from None
    if "model" not in metadata:
        raise ValueError(
            f"network: expected a file whose metadata name its network, got none in {file}; give name={file}"
        )
    return metadata


def _of_run(file: Path, metadata: dict[str, str]) -> Network:
    """Weights that `sansmax train` wrote."""
    name, mechanism = metadata["model"], metadata.get("mechanism") or None
    classes: list[str] = json.loads(metadata["classes"])
    img_size, in_chans = int(metadata["img_size"]), int(metadata["in_chans"])
    words = json.loads(metadata.get("model_args") or "{}")
    model = build(
        name,
        mechanism,
        img_size=img_size,
        num_classes=int(metadata["num_classes"]),
        in_chans=in_chans,
        **words,
    )
    fill(model, safetensors.torch.load_file(file), str(file))
    return Network(
        model,
        named(name, mechanism, words),
        classes or None,
        img_size,
        float(metadata["eval_crop"]),
        metadata["interpolation"],
        tuple(json.loads(metadata["mean"])),
        tuple(json.loads(metadata["std"])),
        in_chans,
        {"model": name, "mechanism": mechanism, "model_args": words},
    )


def named(model: str, mechanism: str | None, model_args: dict[str, Any]) -> str:
    """What a user calls a network that `build` makes."""
    kinds = [mechanism] if mechanism else []
    kinds += [f"{one['mechanism']} swapped in" for one in model_args.get("swap", ())]
    return f"{model} with {' and '.join(kinds)}" if kinds else model


def _of_file(name: str, file: Path) -> Network:
    """A published checkpoint; the head has as many classes as the file."""
    _check_takes_images(name)
    model: Any = timm.create_model(name)
    state = own_state(model, file)
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    if adapt := getattr(module, "checkpoint_filter_fn", None):  # of timm: renames a checkpoint's keys
        state = adapt(state, model)
    classifier = model.pretrained_cfg.get("classifier") or ""
    head = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    if head is not None and head.ndim and len(head) != model.num_classes:
        model.reset_classifier(len(head))
    fill(model, state, str(file))
    return _as_published(model, name)


def _untrained(name: str) -> Network:
    _check_takes_images(name)
    return _as_published(timm.create_model(name), name)


def _of_timm(name: str) -> Network:
    """Weights that timm fetches, or has fetched before."""
    _check_takes_images(name)
    if not timm.get_pretrained_cfg(name).has_weights:  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError(
            f"network: expected a name with weights of timm, got {name}, for which none are hosted; give a "
            f"run folder or {name}=CHECKPOINT"
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's, the network's and the disk's
        raise OSError(
            f"network: expected to fetch the weights of {name}, got {type(error).__name__}; go online, or "
            f"give {name}=CHECKPOINT"
        ) from None
    return _as_published(model, name)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check_takes_images(name: str) -> None:
    cfg: Any = timm.get_pretrained_cfg(name)
    if cfg.input_size is None and not cfg.architecture.startswith("vit_mini"):
        raise ValueError(f"network: expected one that takes images, got {name}; choose another")


def _as_published(model: nn.Module, name: str) -> Network:
    config = resolve_model_data_config(model)
    in_chans, _, side = config["input_size"]
    return Network(
        model,
        name,
        None,
        side,
        config["crop_pct"],
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
        in_chans,
        {"model": name, "mechanism": None, "model_args": {}},
    )


def at_size(network: Network, img_size: int) -> Network:
    """At this image size, after one image has gone through; its model is changed.

    Raises:
        ValueError: it does not take images of that size.
    """
    model: Any = network.model.eval()
    side, channels = network.img_size, network.in_chans
    if channels not in (1, 3):
        raise ValueError(
            f"network: expected one for images of 1 or 3 channels, got {network.name} with {channels}"
        )
    try:
        if img_size != side and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(img_size, img_size))
            embed = getattr(model, "patch_embed", None)
            patch = max(getattr(embed, "patch_size", (1, 1)))
            if img_size % patch and not getattr(embed, "dynamic_img_pad", False):
                raise ValueError(f"no multiple of its patch of {patch}")
        with torch.inference_mode():
            output = model(torch.zeros(1, channels, img_size, img_size))
    except Exception as error:  # networks refuse with AssertionError, RuntimeError, ValueError and more
        raise ValueError(
            f"img_size: expected a size that {network.name} takes, got {img_size} "
            f"({' '.join(str(error).split()) or type(error).__name__}); use {side}"
        ) from None
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(
            f"network: expected one that classifies images, got {network.name}, which gives something else; "
            f"choose another"
        )
    return replace(network, img_size=img_size)

"""What is compared: the settings, their defaults, what they must satisfy, the network they stand for."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from .._find import names, pick
from ..bench import measure
from ..models import create_model
from ..tasks._data import Images
from ..tasks._data.settings import Augment
from .checkpoint import read_json, write_json
from .recipe import Optim, Recipe

__all__ = [
    "BASELINE",
    "CompareConfig",
    "augmentation",
    "check_continues",
    "checked",
    "completed",
    "network",
    "recipe",
    "settings",
]

BASELINE = "softmax"  # all figures are compared with it
DIGITS = {"epochs": 14, "img_size": 8, "patch_size": 2}
PHOTOS = {"epochs": 30, "img_size": 64, "patch_size": 8}


@dataclass(frozen=True)
class CompareConfig:
    """What is compared; None stands for a default that depends on the data and the trunk.

    The mechanisms always include softmax; none stands for all. `device` is auto, cpu or cuda.
    """

    data: str = "digits"
    mechanisms: tuple[str, ...] = ()
    trunk: str = "vit_mini"
    epochs: int | None = None
    img_size: int | None = None
    patch_size: int | None = None
    batch_size: int = 48
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    out: str = "sansmax-compare"
    sweep: bool = True

    def command(self) -> list[str]:
        """The command line of this comparison."""
        words = ["sansmax", "compare"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            flag = field.name.replace("_", "-")
            if value is False:
                words.append(f"--no-{flag}")
            elif field.name == "seeds" and value == tuple(range(len(value))):
                words += [f"--{flag}", str(len(value))]
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
        return words


def checked(config: CompareConfig) -> CompareConfig:
    """Known mechanisms and device, numbers in range, an absolute path of the data; else ValueError."""
    known = names("sansmax.layers")
    mechanisms = [pick("mechanisms", name, known) for name in config.mechanisms or known]
    for name in ("epochs", "img_size", "patch_size", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(
                f"{name}: expected a whole number of at least 1, got {value}; leave it out if unsure"
            )
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise ValueError(f"lr: expected a learning rate above 0, got {config.lr:g}; leave it out if unsure")
    if not config.seeds or min(config.seeds) < 0 or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(
            f"seeds: expected different whole numbers of at least 0, got {list(config.seeds)}; "
            f"give a count such as 3"
        )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device: expected auto, cpu or, where PyTorch sees a GPU, cuda, got {device!r}; leave it out to "
            f"take what is there, or choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    return dataclasses.replace(
        config,
        data=config.data if config.data == "digits" else str(Path(config.data).expanduser().resolve()),
        mechanisms=tuple(dict.fromkeys([BASELINE, *mechanisms])),
        device=device,
    )


def completed(config: CompareConfig, images: Images) -> CompareConfig:
    """Every default filled in; builds the network once, so that what does not fit is told before training."""
    defaults = PHOTOS if images.photos else DIGITS
    size = images.train_images.shape[-1]
    patch = config.patch_size or (defaults["patch_size"] if config.trunk == "vit_mini" else None)
    if patch is not None and size % patch:
        raise ValueError(
            f"patch_size: expected a divisor of the image size {size}, got {patch}; use one of "
            f"{[p for p in range(1, size + 1) if size % p == 0]}"
        )
    config = dataclasses.replace(
        config, epochs=config.epochs or defaults["epochs"], img_size=size, patch_size=patch
    )
    network(config, images, BASELINE)
    return config


def network(config: CompareConfig, images: Images, mechanism: str, seed: int = 0) -> nn.Module:
    """The trunk with a mechanism, on the CPU."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if config.patch_size is None else {"patch_size": config.patch_size}
    if config.trunk == "vit_mini":
        options["class_token"] = False
    return create_model(
        config.trunk,
        mechanism,
        img_size=config.img_size,
        in_chans=images.train_images.shape[1],
        num_classes=len(images.classes),
        **options,
    )


def augmentation(images: Images) -> Augment:
    """Crops of 35 to 100 % and mirror images of photos; shifts of half a pixel of the digits' eight."""
    if images.photos:
        return Augment(scale=(0.35, 1.0))
    return Augment(scale=(1.0, 1.0), shift=1 / 16, hflip=0.0)


def recipe(config: CompareConfig, images: Images, seed: int) -> Recipe:
    """AdamW, a linear warm-up over a tenth of the updates, a cosine down to zero."""
    assert config.epochs is not None
    return Recipe(
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        device=config.device,  # pyright: ignore[reportArgumentType]
        augment=augmentation(images),
        optim=Optim(
            lr=config.lr,
            lr_batch=None,
            clip=1.0,
            per="update",
            warmup=config.epochs / 10,
            warmup_lr=config.lr / 100,
            min_lr=0.0,
        ),
    )


def settings(config: CompareConfig, images: Images) -> dict[str, Any]:
    """What must be equal for the figures of two runs to stand in one table."""
    kept = dataclasses.asdict(config)
    for name in ("mechanisms", "seeds", "out", "sweep"):
        del kept[name]
    machine = measure.machine()
    return {
        "sansmax": __version__,
        **kept,
        "training images": len(images.train_labels),
        "held-out images": len(images.val_labels),
        "classes": len(images.classes),
        **{name: machine[name] for name in ("cpu", "gpu", "torch_threads")},
    }


def check_continues(folder: Path, wanted: dict[str, Any]) -> None:
    """Writes the settings to a fresh folder, or compares them with those of the runs in it."""
    path = folder / "config.json"
    before = read_json(path)
    if before is None:
        write_json(path, wanted)
        return
    for name, value in wanted.items():
        if before.get(name) != value:
            raise ValueError(
                f"out: expected {name} {before.get(name)!r}, with which {folder} was begun, got {value!r}; "
                f"use the same, or name another folder with --out"
            )

"""A trained network with another attention: each new layer learns from the old one, then the whole from the whole."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from ..adapt.distil import recover_layers
from ..adapt.swap import Report, swap
from ..bench import measure
from ..tasks._data.batches import InMemory, Source
from ..tasks._data.draws import Part
from ..tasks._run import Words, at_least, positive
from ..tasks.classification import Classification
from . import artifacts, parallel
from .checkpoint import prepare_folder, read_json, write_json, write_text
from .images import check_fits, metadata, open_images
from .loop import Outcome
from .network import Network, at_size, load_network
from .receipt import markdown
from .recipe import Distil, Recipe, read_recipe
from .run import run
from .verdicts import evaluate

__all__ = ["Adapt", "adapt", "recipe_of"]

EPOCHS = 10  # of the whole network, unless asked otherwise
BATCH = 128
CLOSED = 256  # batches at most that the closed form sees
HELD_OUT = 512  # images on which the layers' errors are told
TRIED = 2048  # images on which every layer is tried alone
START, RECEIPT = "start.safetensors", "receipt.json"


@dataclass(frozen=True)
class Adapt:
    """Which attentions become what, and how each learns from the old one."""

    layers: tuple[str, ...] = ()
    """Patterns of names such as 'blocks.*.attn'; none: all attentions."""
    keep: int = 0
    """How many of them stay as they are: those whose replacement alone costs most accuracy."""
    mechanism_args: Words = field(default_factory=dict)
    """The new layers' own options, as JSON."""
    layer_updates: int = 500
    """Updates by gradient of every layer, behind the closed form of its output."""
    layer_lr: float = 1e-3
    """Highest learning rate of these."""
    whole: bool = True
    """Whether the whole network then learns from the old one, as the flags of `sansmax train` below say."""
    sizes: tuple[int, ...] = ()
    """Sides of images at which speed and memory are measured; none: the network's, twice and four times."""


def recipe_of(network: Network, what: str) -> Recipe:
    """The run in which the whole network learns, as far as it follows from what `what` was trained with.

    Raises:
        ValueError: it is a run of another task.
    """
    folder = Path(what).expanduser()
    info = read_json(folder / "recipe.json") if folder.is_dir() else None
    base: Any = Recipe(batch_size=BATCH, img_size=network.img_size, eval_crop=network.crop)
    if info is not None:
        base = read_recipe(info)
    optim = replace(base.optim, lr=base.optim.lr / 2, warmup=0, milestones=(), sched="cosine", per="update")
    return replace(
        base,
        **network.made,
        weights="",
        epochs=EPOCHS,
        optim=optim,
        distil=Distil(teacher=what, kind="soft", alpha=0.9, features=1.0),
        out="sansmax-adapted",
        resume=False,
    )


def adapt(
    network: Network, mechanism: str, how: Adapt, recipe: Recipe, console: Console | None = None
) -> dict[str, Any]:
    """Replaces attention in a trained network and lets it learn again.

    Every new layer first learns what the old one said (sansmax.adapt.distil.recover_layers), all in one pass
    over training images as the run augments them. Then the whole network learns as the recipe says, with the
    original as its teacher. `recipe.out` is the folder of that run, and holds receipt.json and receipt.md
    besides; with `how.whole` False it holds best.safetensors and the receipt alone. With recipe.resume the
    layers' part is not done again.

    Args:
        network: what is changed; its model is used up.
        mechanism: a file name of sansmax.layers.

    Returns:
        The receipt.

    Raises:
        ValueError, OSError: nothing can be replaced, or a setting, the data or the folder will not do.
        sansmax.train.guard.Interrupted: see sansmax.train.run.
    """
    recipe = _checked(how, recipe)
    console = console or Console(quiet=True)
    folder = Path(recipe.out).expanduser()
    made = parallel.accelerator(recipe)
    if made.num_processes > 1:
        raise ValueError(
            f"adapt: expected one process, got {made.num_processes}; run `sansmax adapt` without torchrun, and "
            f"with --no-whole if `sansmax train` is to go on with {START} in several"
        )
    prepare_folder(folder)
    asked = {"network": network.fingerprint, "mechanism": mechanism, "how": asdict(how)}
    receipt = _begun(folder, asked, recipe.resume)
    if receipt is None:
        receipt = asked | _layers(network, mechanism, how, recipe, made, folder, console)
        write_json(folder / RECEIPT, receipt)
    start = folder / START
    if how.whole:
        args = recipe.model_args
        swaps = [*args.get("swap", ()), receipt["swap"]]
        after = replace(recipe, model_args={**args, "swap": swaps}, weights=str(start))
        outcome = run(after, console, None)
        receipt["accuracy"]["whole"] = _whole(folder, outcome)
    else:
        (folder / "best.safetensors").write_bytes(start.read_bytes())
    receipt["speed"] = list(_speed(recipe.distil.teacher or "", str(folder), how.sizes, made, console))
    write_json(folder / RECEIPT, receipt)
    write_text(folder / "receipt.md", markdown(receipt))
    return receipt

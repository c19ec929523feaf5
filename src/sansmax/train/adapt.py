"""A trained network with another attention: layers learn from the old ones, then the whole from the whole."""

import itertools
import json
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
from .network import Network, at_size, load_network
from .receipt import markdown
from .recipe import Distil, Recipe, read_recipe
from .run import run
from .verdicts import evaluate

__all__ = ["Adapt", "adapt", "recipe_of"]

EPOCHS = 10  # of the whole network, unless asked otherwise
BATCH = 128
CLOSED = 256  # batches that the closed form sees at most
TOLD = 512  # held-out images on which the layers' errors are told
TRIED = 2048  # held-out images on which every layer is tried alone
START, RECEIPT = "start.safetensors", "receipt.json"


@dataclass(frozen=True)
class Adapt:
    """Which attentions are replaced, and how each learns from the old one."""

    layers: tuple[str, ...] = ()
    """Patterns of names such as 'blocks.*.attn'; none: all attentions."""
    keep: int = 0
    """How many attentions stay as they are: those whose replacement alone costs most accuracy."""
    mechanism_args: Words = field(default_factory=dict)
    """The new layers' own options, as JSON."""
    layer_updates: int = 500
    """Updates by gradient of every layer, behind the closed form of its output."""
    layer_lr: float = 1e-3
    """Highest learning rate of these."""
    whole: bool = True
    """Whether the whole network then learns from the old one, as the flags of `sansmax train` say."""
    sizes: tuple[int, ...] = ()
    """Sides of images at which speed and memory are measured; none: the network's, twice, four times."""


def recipe_of(network: Network, what: str) -> Recipe:
    """The run in which the whole network learns: that of `what`, if it is one, with half its rate, 10 epochs,
    and the network itself as teacher of logits and features.

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
    what: str,
    mechanism: str,
    how: Adapt,
    recipe: Recipe,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Replaces attention in a trained network and lets it learn again.

    Every new layer first learns what the old one said (sansmax.adapt.distil.recover_layers), all in one pass
    over training images as the run augments them. Then the whole network learns as the recipe says, beginning
    with these layers. `recipe.out` is the folder of that run, and holds receipt.json and receipt.md besides;
    with `how.whole` False, best.safetensors and the receipt alone. With recipe.resume, layers that have
    learned do not learn again.

    Args:
        what: the network, as sansmax.train.network.load_network takes it.
        mechanism: a file name of sansmax.layers.
        recipe: of `recipe_of`, changed at will.
        command: that was given.

    Returns:
        The receipt: errors of the layers, accuracies, speed and memory.

    Raises:
        ValueError, OSError: nothing can be replaced, or a setting, the data or the folder will not do.
        sansmax.train.guard.Interrupted: see sansmax.train.run.run.
    """
    at_least(0, keep=how.keep, layer_updates=how.layer_updates)
    at_least(8, sizes=min(how.sizes, default=8))
    positive({"layer_lr": how.layer_lr})
    recipe = recipe.checked()
    console = console or Console(quiet=True)
    made = parallel.accelerator(recipe)
    if made.num_processes > 1:
        raise ValueError(
            f"adapt: expected one process, got {made.num_processes}; run `sansmax adapt` without torchrun"
        )
    folder = Path(recipe.out).expanduser()
    prepare_folder(folder)
    network = load_network(what, img_size=recipe.img_size)
    asked = {
        "network": network.name,
        "fingerprint": network.fingerprint,
        "mechanism": mechanism,
        "how": json.loads(json.dumps(asdict(replace(how, sizes=())))),
    }
    receipt = _begun(folder, asked, recipe.resume)
    if receipt is None:
        receipt = asked | _layers_learned(network, how, mechanism, recipe, made, folder, console)
        write_json(folder / RECEIPT, receipt)
    if how.whole:
        outcome = run(_with_swap(recipe, receipt["swap"], folder), console, command)
        best = read_json(folder / "recipe.json")["best"]
        receipt["accuracy"] |= {"whole": best}
        receipt["seconds"] |= {"whole": outcome.train_seconds}
    else:
        (folder / "best.safetensors").write_bytes((folder / START).read_bytes())
    with console.status("speed and memory"):
        receipt["speed"] = list(_speed(what, folder, how.sizes, made.device))
    write_json(folder / RECEIPT, receipt)
    write_text(folder / "receipt.md", markdown(receipt))
    return receipt


def _with_swap(recipe: Recipe, words: dict[str, Any], folder: Path) -> Recipe:
    args = recipe.model_args
    swaps = [*args.get("swap", ()), words]
    return replace(recipe, model_args={**args, "swap": swaps}, weights=str(folder / START))


def _begun(folder: Path, asked: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The receipt of an earlier command whose layers have learned.

    Raises:
        ValueError: there is one and no --resume, or it is of something else.
    """
    there = [name for name in (RECEIPT, "recipe.json", "best.safetensors") if (folder / name).exists()]
    if there and not resume:
        raise ValueError(
            f"out: expected a new folder, got {folder} with {there[0]} in it; add --resume to go on with it, "
            "or name another folder with --out"
        )
    before = read_json(folder / RECEIPT)
    if before is None:
        if there:
            raise ValueError(
                f"out: expected {RECEIPT} beside {there[0]} in {folder}, got none; name another folder with "
                "--out"
            )
        return None
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}: expected {before.get(name)!r}, with which {folder} was begun, got {value!r}; use "
                "the same, or name another folder with --out"
            )
    return before if (folder / START).is_file() else None


def _layers_learned(
    network: Network,
    how: Adapt,
    mechanism: str,
    recipe: Recipe,
    made: Accelerator,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """The layers' part of the receipt; START holds the network."""
    source = open_images(recipe, made, console)
    if network.num_classes != len(source.classes):
        raise ValueError(
            f"network: expected one with the {len(source.classes)} classes of {source.title}, got "
            f"{network.name} with {network.num_classes}; train it on these images first"
        )
    check_fits(network, source, "network")
    for name in ("mean", "std"):
        own, seen = getattr(network, name), getattr(source, name)
        if max(abs(a - b) for a, b in zip(own, seen, strict=True)) > 1e-3:
            raise ValueError(
                f"data: expected images with the {name} {own} that {network.name} learned with, got {seen}; "
                "give the images that it was trained on, or a network of timm"
            )
    model = network.model.to(made.device)
    task = Classification(source, recipe.augment)

    def accuracy() -> float:
        return task.scores(evaluate(model, task, made))["top1"]

    scores, seconds = {"before": accuracy()}, {}
    _, report = swap(model, mechanism, how.layers or None, how.mechanism_args)
    if how.keep >= len(report.swapped):
        raise ValueError(
            f"keep: expected less than the {len(report.swapped)} layers that can be replaced, got "
            f"{how.keep}; lower it"
        )
    console.print(f"{len(report.swapped)} layers become {mechanism}", highlight=False)
    scores["at_once"] = accuracy()
    started = time.perf_counter()
    with console.status("every layer learns from the old one"):
        learned = recover_layers(
            report,
            _training(source, recipe),
            lambda: _held_out(source, TOLD),
            updates=how.layer_updates,
            lr=how.layer_lr,
        )
    seconds["layers"] = time.perf_counter() - started
    with console.status("every layer alone"):
        alone = _alone(report, source)
    dearest = sorted(alone, key=lambda name: (-alone[name]["cost"], name))[: how.keep]
    report.leave(dearest)
    scores["layers"] = accuracy()
    words = {
        "mechanism": mechanism,
        "layers": [one.name for one in report.swapped],
        "mechanism_args": how.mechanism_args,
    }
    _save(_with_swap(recipe, words, folder), network, source, scores["layers"], folder)
    return {
        "swap": words,
        "layers": [asdict(one) | alone[one.name] | {"kept": one.name in dearest} for one in learned],
        "left": [name for name in report.left + report.already if name not in dearest],
        "refused": report.refused,
        "tried": min(TRIED, source.val_size),
        "accuracy": scores,
        "seconds": seconds,
        "data": {"name": source.title, "train": source.train_size, "val": source.val_size},
        "machine": measure.machine(),
        "versions": measure.versions(),
        "commit": measure.commit(),
    }


def _training(source: Source, recipe: Recipe) -> Callable[[], Iterable[Tensor]]:
    """A call gives training images as the run augments them, in another order each time."""
    epochs = itertools.count()
    part = Part(min(recipe.batch_size, source.train_size), seed=recipe.seed)

    def images() -> Iterator[Tensor]:
        for batch in itertools.islice(source.train(next(epochs), 0, part), CLOSED):
            yield batch.images

    return images


def _held_out(source: Source, count: int) -> Iterator[Tensor]:
    for batch, _ in _labelled(source, count):
        yield batch


def _labelled(source: Source, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` held-out images."""
    for batch in source.val(0, 1, BATCH):
        yield batch.images[:count], batch.labels[:count]
        count -= len(batch)
        if count <= 0:
            return


@torch.inference_mode()
def _alone(report: Report, source: Source) -> dict[str, dict[str, float]]:
    """Of every new layer: the accuracy of the old network with it alone, and how far that is below the old
    network's, in shares, with the standard error of that difference."""
    right: dict[str, list[Tensor]] = {one.name: [] for one in report.swapped}
    base: list[Tensor] = []
    for images, labels in _labelled(source, TRIED):
        base.append(_right(report.undo().eval(), images, labels))
        for name, known in right.items():
            known.append(_right(report.only([name]).eval(), images, labels))
    report.redo()
    found = {}
    for name, known in right.items():
        lost = torch.cat(base) - torch.cat(known)
        error = (lost.var(correction=0) / len(lost)).sqrt().item()
        found[name] = {"alone": torch.cat(known).mean().item(), "cost": lost.mean().item(), "error": error}
    return found


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (model(images).argmax(1) == labels).double()


def _save(recipe: Recipe, network: Network, source: Source, top1: float, folder: Path) -> None:
    about = {
        "classes": source.classes,
        "network": {
            "img_size": network.img_size,
            "in_chans": network.in_chans,
            "mean": list(network.mean),
            "std": list(network.std),
        },
    }
    crop = 1.0 if isinstance(source, InMemory) else recipe.eval_crop
    told = metadata(recipe, about, {"epoch": 0, "top1": top1}, crop)
    state = {key: value.cpu() for key, value in network.model.state_dict().items()}
    artifacts.save_weights(folder / START, state, told)


def _speed(what: str, folder: Path, sizes: tuple[int, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """Of both networks, an image at a time: milliseconds, taken in turn, and the peak memory of a call."""
    side = load_network(what).img_size
    for size in sizes or (side, 2 * side, 4 * side):
        row: dict[str, Any] = {"img_size": size}
        calls: dict[str, Callable[[], object]] = {}
        for name, which in (("before", what), ("after", str(folder))):
            try:
                network = at_size(load_network(which), size)
            except ValueError as error:
                row["skipped"] = str(error)
                break
            image = torch.randn(1, network.in_chans, size, size, device=device)
            calls[name] = _call(network.model.to(device), image)
        else:
            samples = measure.interleaved(calls, device=device)
            row["ms"] = {name: measure.spread(taken, 1e3) for name, taken in samples.items()}
            ratios = [a / b for a, b in zip(samples["before"], samples["after"], strict=True)]
            row["faster"] = measure.spread(ratios)
            row["peak_mb"] = {name: measure.peak_memory(call, device) / 1e6 for name, call in calls.items()}
        yield row


def _call(model: nn.Module, image: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        return model(image)

    return call

"""A run: its folder, its data, its network, the loop, and what is kept."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from ..tasks._data.batches import InMemory, Source
from ..tasks._data.sources import open_source
from ..tasks.classification import Classification, Teacher
from . import artifacts, parallel
from .checkpoint import States, prepare_folder, read_json, write_json
from .loop import Outcome, train
from .network import Network, build, load_network
from .recipe import Recipe

__all__ = ["run"]

# What may differ between the command that began a run and the one that goes on with it.
FREE = {
    "out",
    "resume",
    "save_every",
    "keep",
    "log_every",
    "bad_steps",
    "tensorboard",
    "wandb",
    "device",
    "parallel",
    "compile",
    "channels_last",
    "checkpointing",
    "accumulate",
    "data.workers",
    "data.root",
    "data.download",
}


def run(recipe: Recipe, console: Console | None = None, command: str | None = None) -> Outcome:
    """Trains as the recipe says; `recipe.out` then holds

    recipe.json (also classes, versions, machine), metrics.jsonl, weights.safetensors, best.safetensors
    (highest top-1), evaluation.npz and gallery.json (the last evaluation), skipped.json, states/ and
    report.html.

    Args:
        console: where progress is shown; None is silent.
        command: that was given; None: the shortest that gives this recipe.

    Raises:
        ValueError, OSError: a setting, the data or the folder will not do; one sentence says what to do.
        sansmax.train.guard.Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    recipe = recipe.checked()
    made = parallel.accelerator(recipe)
    console = console if console and made.is_main_process else Console(quiet=True)
    folder = Path(recipe.out).expanduser()
    if made.is_main_process:
        prepare_folder(folder)
    made.wait_for_everyone()
    if recipe.optim.warmup >= recipe.epochs:
        console.print(
            f"optim.warmup: the rate still rises when the run of {recipe.epochs} epochs ends, because it "
            f"warms up for {recipe.optim.warmup:g}",
            highlight=False,
            soft_wrap=True,
        )
    before = _begun(folder, recipe)
    made.wait_for_everyone()  # all have looked before one writes
    config = _data_config(recipe)
    side = recipe.img_size or config["size"]
    if side is None and recipe.data.root != "digits":
        raise ValueError(
            f"img_size: expected the side of the images for {recipe.model}, which has none of its own, got "
            "none; add --img-size 64"
        )
    # One process fetches what others then find.
    fetching = made.local_main_process_first() if recipe.data.download else contextlib.nullcontext()
    with console.status("reading the images"), fetching:
        source = open_source(
            recipe.data,
            recipe.augment,
            side,
            recipe.eval_crop,
            config["mean"],
            config["std"],
            made.device,
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    _check_classes(source, before, folder)
    size = recipe.img_size or source_size(source)
    model = network(recipe, source)
    _check_outputs(model, recipe, torch.zeros(1, len(source.mean), size, size), len(source.classes))
    if recipe.weights and not (recipe.resume and States(folder / "states").paths()):
        load_weights(model, recipe)
    task = Classification(source, recipe.augment, teacher(recipe, source, size, made.device))
    about = before or artifacts.about(recipe, source, model, size, command)
    if made.is_main_process and not before:
        write_json(folder / "recipe.json", about)
    best, unreadable = [about.get("best", -math.inf)], list(source.skipped)

    def keep(point: dict[str, float], evaluated: nn.Module, verdicts: Tensor) -> None:
        """After every epoch: the best weights, what could not be read."""
        best_so_far = point["top1"] > best[0]
        last = point["epoch"] == recipe.epochs
        best[0] = max(best[0], point["top1"])
        tensors = parallel.weights(evaluated) if best_so_far or last else {}
        unreadable[:] = parallel.gathered(made, source.skipped)
        if not made.is_main_process:
            return
        crop = 1.0 if isinstance(source, InMemory) else recipe.eval_crop
        metadata = artifacts.metadata(recipe, about, point, crop)
        for name in ["best"] * best_so_far + ["weights"] * last:
            artifacts.save_weights(folder / f"{name}.safetensors", tensors, metadata)
        if best_so_far:
            write_json(folder / "recipe.json", {**about, "best": best[0]})
        artifacts.save_verdicts(folder, verdicts)
        if unreadable:
            write_json(folder / "skipped.json", unreadable)

    outcome = train(model, task, recipe, folder, keep, console)
    if made.is_main_process:
        write_json(folder / "gallery.json", artifacts.gallery(source, outcome.verdicts))
        artifacts.report(folder, console)
        if unreadable:
            first = "{path}: {reason}".format(**unreadable[0])
            console.print(
                f"skipped {len(unreadable)} unreadable images, listed in {folder / 'skipped.json'}, "
                f"the first {first}",
                highlight=False,
            )
    return outcome


def network(recipe: Recipe, source: Source) -> nn.Module:
    """The recipe's network with random weights, the same in every process."""
    torch.manual_seed(recipe.seed)
    words: dict[str, Any] = dict(recipe.model_args)
    if recipe.drop_path:
        words["drop_path_rate"] = recipe.drop_path
    size = recipe.img_size
    if size is None and recipe.model.startswith("vit_mini"):
        size = source_size(source)
    try:
        return build(
            recipe.model,
            recipe.mechanism,
            img_size=size,
            num_classes=len(source.classes),
            in_chans=len(source.mean),
            **words,
        )
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model: expected words that {recipe.model} takes, got {' '.join(str(error).split())}; check "
            "model_args, drop_path, img_size and mechanism"
        ) from None


def source_size(source: Source) -> int:
    """Side of the images that a source gives."""
    batch = next(iter(source.val(0, 1, 1)), None)
    if batch is None:
        raise ValueError(
            "data: expected held-out images that can be read, got none; check data.root and data.val_split"
        )
    return batch.images.shape[-1]


def load_weights(model: Any, recipe: Recipe) -> None:
    """The recipe's `weights`; a head of another number of classes stays as it was built.

    Raises:
        ValueError: anything else does not fit; the text names it.
    """
    what = recipe.weights
    if what == "pretrained":
        what = recipe.model
    elif Path(what).expanduser().is_file() and not what.endswith(".safetensors"):
        what = f"{recipe.model}={what}"
    loaded = load_network(what, img_size=recipe.img_size)
    given, own = loaded.model.state_dict(), model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    head = {key for key in own if key.startswith(tuple(f"{name}." for name in heads))}
    odd = [k for k in own.keys() ^ given.keys() if k not in head]
    odd += [k for k in own.keys() & given.keys() if k not in head and own[k].shape != given[k].shape]
    if odd:
        raise ValueError(
            f"weights: expected those of {recipe.model} as it is built here, got {loaded.name}, which "
            f"differs in {len(odd)} tensors, such as {sorted(odd)[0]}; check model, mechanism, model_args "
            "and img_size"
        )
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fits, strict=False)


def teacher(recipe: Recipe, source: Source, size: int, device: torch.device) -> Teacher | None:
    """The network that is learned from, on the device.

    Raises:
        ValueError: it has other classes than the data.
    """
    wanted = recipe.distil
    if not wanted.teacher:
        return None
    loaded = load_network(wanted.teacher, img_size=size, num_classes=len(source.classes))
    if loaded.in_chans != len(source.mean):
        raise ValueError(
            f"distil.teacher: expected a network for {len(source.mean)} channels, got {loaded.name} with "
            f"{loaded.in_chans}; give another"
        )
    if loaded.classes and loaded.classes != source.classes:
        raise ValueError(
            f"distil.teacher: expected a network that learned the classes of {source.title} in their "
            f"order, got {loaded.name} with {loaded.classes[:3]} and so on; give another"
        )
    seen = nn.Sequential(Renormalised(source, loaded), loaded.model)
    return Teacher(seen.to(device), wanted.kind, wanted.alpha, wanted.tau)


class Renormalised(nn.Module):
    """Images with the mean and deviation of a source, given those of another network."""

    def __init__(self, source: Source, other: Network) -> None:
        super().__init__()
        mean, std, its_mean, its_std = (
            torch.tensor(x)[:, None, None] for x in (source.mean, source.std, other.mean, other.std)
        )
        self.scale, self.shift = nn.Buffer(std / its_std), nn.Buffer((mean - its_mean) / its_std)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def _data_config(recipe: Recipe) -> dict[str, Any]:
    """Mean, deviation and side of the images that the network is published for; ImageNet's where it has
    none."""
    found: Any = timm.get_pretrained_cfg(recipe.model) if timm.is_model(recipe.model) else None
    size = (
        found.input_size[-1]
        if found and found.input_size and not recipe.model.startswith("vit_mini")
        else None
    )
    mean, std = (found.mean, found.std) if found else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {"size": size, "mean": tuple(mean), "std": tuple(std)}


def _begun(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What an earlier command wrote of this run.

    Raises:
        ValueError: there is a run and no --resume, or it is another one.
    """
    before = read_json(folder / "recipe.json")
    if before is None:
        return None
    if not recipe.resume:
        raise ValueError(
            f"out: expected a new folder, got {folder} with a run in it; add --resume to go on with it, or "
            "name another folder with --out"
        )
    if not isinstance(before, dict) or not {"recipe", "classes", "data", "network"} <= before.keys():
        raise ValueError(
            f"out: expected what `sansmax train` writes in {folder / 'recipe.json'}, got something else; "
            "name another folder with --out"
        )
    old, new = _flat(Recipe.from_json(before["recipe"]).to_json()), _flat(recipe.to_json())
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            raise ValueError(
                f"{name}: expected {old.get(name)!r}, with which {folder} was begun, got "
                f"{new.get(name)!r}; use the same, or name another folder with --out"
            )
    return before


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "model_args":
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_classes(source: Source, before: dict[str, Any] | None, folder: Path) -> None:
    if before and before["classes"] != source.classes:
        raise ValueError(
            f"data: expected the {len(before['classes'])} classes with which {folder} was begun, got "
            f"{len(source.classes)} others; check data.root and data.split"
        )
    if before and before["data"]["train"] != source.train_size:
        raise ValueError(
            f"data: expected the {before['data']['train']} training images with which {folder} was begun, "
            f"got {source.train_size}; check data.root and data.split"
        )


def _check_outputs(model: nn.Module, recipe: Recipe, images: Tensor, classes: int) -> None:
    try:
        with torch.inference_mode():
            outputs = model.eval()(images)
    except Exception as error:  # networks refuse with AssertionError, RuntimeError, ValueError and more
        raise ValueError(
            f"img_size: expected a size that {recipe.model} takes, got {images.shape[-1]} "
            f"({' '.join(str(error).split()) or type(error).__name__}); use another, or leave it out"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.shape != (1, classes):
        raise ValueError(
            f"model: expected a network that classifies images, got {recipe.model}, which gives something "
            "else; choose another"
        )
    model.train()

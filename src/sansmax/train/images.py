"""A run of image classification: its images, its network and teacher, and what it keeps."""

import base64
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..maps import attention_map, or_middle, overlay, picture
from ..tasks._data.batches import InMemory, Source
from ..tasks._data.sources import open_source
from ..tasks.classification import Classification, Teacher
from .checkpoint import States, replace_file, write_json
from .job import Job, png
from .loop import Outcome
from .network import Network, build, load_network
from .recipe import Recipe

__all__ = ["check_fits", "image_job", "metadata", "network", "open_images", "source_size", "teacher"]

PICTURES = 12  # of either kind in the report
MAPPED, SIDE = 6, 160  # images of the report with their attention maps, pixels


def image_job(recipe: Recipe, made: Accelerator, folder: Path, console: Console) -> Job:
    """Reads the images and builds the network and its teacher."""
    source = open_images(recipe, made, console)
    size = recipe.img_size or source_size(source)
    model = network(recipe, source)
    example = torch.zeros(1, len(source.mean), size, size)
    _check_outputs(model, recipe, example, len(source.classes))
    if recipe.weights and not (recipe.resume and States(folder / "states").paths()):
        load_weights(model, recipe)
    taught: Any = teacher(recipe, source, size, made.device)
    if taught is not None and recipe.distil.features:
        taught.imitated(model, taught.model[-1], recipe.distil.features)
    task = Classification(source, recipe.augment, taught)
    about = {
        "img_size": size,
        "in_chans": len(source.mean),
        "mean": list(source.mean),
        "std": list(source.std),
    }
    crop = 1.0 if isinstance(source, InMemory) else recipe.eval_crop

    def finish(outcome: Outcome) -> None:
        if made.is_main_process:
            write_json(folder / "gallery.json", gallery(source, outcome.verdicts))
            # Weights that are shared out (FSDP) are whole within a forward pass alone.
            shared = recipe.parallel == "fsdp"
            write_json(folder / "pictures.json", [] if shared else attention(outcome.network.eval(), source))

    return Job(
        task,
        model,
        about,
        example,
        metadata=lambda about, point: metadata(recipe, about, point, crop),
        keep=lambda verdicts: save_verdicts(folder, verdicts),
        finish=finish,
    )


def open_images(recipe: Recipe, made: Accelerator, console: Console) -> Source:
    """The recipe's data as its network takes them."""
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
        return open_source(
            recipe.data,
            recipe.augment,
            side,
            recipe.eval_crop,
            config["mean"],
            config["std"],
            made.device,
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )


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
    check_fits(loaded, source, "distil.teacher")
    seen = nn.Sequential(Renormalised(source, loaded), loaded.model)
    return Teacher(seen.to(device), wanted.kind, wanted.alpha, wanted.tau)


def check_fits(network: Network, source: Source, what: str) -> None:
    """ValueError that begins with `what` where a network is for other channels or classes."""
    if network.in_chans != len(source.mean):
        raise ValueError(
            f"{what}: expected a network for {len(source.mean)} channels, got {network.name} with "
            f"{network.in_chans}; give another"
        )
    if network.classes and network.classes != source.classes:
        raise ValueError(
            f"{what}: expected a network that learned the classes of {source.title} in their order, got "
            f"{network.name} with {network.classes[:3]} and so on; give another"
        )


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


def metadata(recipe: Recipe, about: dict[str, Any], point: dict[str, float], crop: float) -> dict[str, str]:
    """What load_network needs to build the network again and to show it images."""
    of = about["network"]
    kind = recipe.augment.interpolation
    return {
        "model": recipe.model,
        "mechanism": recipe.mechanism or "",
        "model_args": json.dumps(recipe.model_args),
        "num_classes": str(len(about["classes"])),
        "classes": json.dumps(about["classes"]),
        "img_size": str(of["img_size"]),
        "in_chans": str(of["in_chans"]),
        "mean": json.dumps(of["mean"]),
        "std": json.dumps(of["std"]),
        "eval_crop": str(crop),
        "interpolation": "bicubic" if kind == "random" else kind,
        "epoch": str(point["epoch"]),
        "top1": str(point["top1"]),
    }


def save_verdicts(folder: Path, verdicts: Tensor) -> None:
    """evaluation.npz; see Classification.verdict."""
    k = (verdicts.shape[1] - 4) // 2
    columns: dict[str, Any] = {
        "labels": verdicts[:, 1].long().numpy(),
        "truth": verdicts[:, 3].float().numpy(),
        "top": verdicts[:, 4 : 4 + k].long().numpy(),
        "probabilities": verdicts[:, 4 + k :].float().numpy(),
    }
    content = io.BytesIO()
    np.savez_compressed(content, **columns)
    replace_file(folder / "evaluation.npz", lambda path: path.write_bytes(content.getvalue()))


def attention(model: nn.Module, source: Source) -> list[dict[str, str]]:
    """For the report: held-out images and, below, what a token of the last layer attends to; nothing of a
    network that has no such map."""
    images = next(iter(source.val(0, 1, MAPPED))).images
    pairs, query = [], None
    for image in images:
        try:
            weights, query = or_middle(attention_map, model, image)
        except ValueError:
            return []
        shown = picture(image, source.mean, source.std, SIDE)
        pairs.append((shown, overlay(shown, weights, query)))
    width, height = pairs[0][0].size
    strip = Image.new("RGB", (len(pairs) * (width + 4) - 4, 2 * height + 4), "white")
    for number, pair in enumerate(pairs):
        for row, one in enumerate(pair):
            strip.paste(one, (number * (width + 4), row * (height + 4)))
    token = "the class token" if query is None else "the framed token"
    caption = (
        f"The first held-out images, and what {token} of the last layer attends to: red where a token weighs "
        "more, blue where its weight is negative; `sansmax map` draws others"
    )
    return [{"title": "Attention", "caption": caption, "png": base64.b64encode(png(strip)).decode()}]


def gallery(source: Source, verdicts: Tensor) -> list[dict[str, Any]]:
    """The held-out images that the network is most wrong and most right about."""
    by_loss = verdicts[:, 2].argsort(descending=True, stable=True)
    count = min(PICTURES, len(by_loss) // 2)
    chosen = [("worst", row) for row in by_loss[:count]] + [("best", row) for row in by_loss.flip(0)[:count]]
    pictures = []
    for kind, row in chosen:
        position, label, _, truth, predicted = verdicts[row][:5].tolist()
        found = source.picture(int(position))
        if found is None:
            return []
        image, name = found
        image.thumbnail((160, 160))
        pictures.append(
            {
                "png": base64.b64encode(png(image)).decode(),
                "name": name,
                "truth": source.classes[int(label)],
                "predicted": source.classes[int(predicted)],
                "probability": verdicts[row][4 + (verdicts.shape[1] - 4) // 2].item(),
                "truth_probability": truth,
                "kind": kind,
            }
        )
    return pictures

"""A static page that runs a network in the browser, beside the same network with softmax."""

import copy
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..layers import Mixer
from ..layers.softmax import Softmax
from ..maps import attention_map, layers_run
from ._graph import traced, write_onnx
from ._latency import softmax_twin
from ._runtime import Session, differences, refused
from ._subject import Subject, images

__all__ = ["Shown", "export_web"]

ORT = "1.30.0"  # of onnxruntime-web
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = Path(__file__).with_name("_web")
SHARES = (0.5, 0.75, 1.5, 2, 2.5, 3, 4)  # of the network's own side, which the slider has besides


@dataclass(frozen=True)
class Shown:
    """A network of images and how they become its input.

    Attributes:
        img_size: side of the images that it learned with.
        crop: share of the resized side that is kept.
        mean, std: of each channel, for pixels 0..1; one channel or three.
    """

    model: nn.Module
    name: str
    classes: list[str]
    img_size: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def export_web(shown: Shown, out: str | Path, beside: Shown | None = None) -> dict[str, Any]:
    """Writes the page into the new folder `out`, whole or not at all; any web server shows it.

    index.html, style.css, page.js, about.json, example.png, ort/ (onnxruntime-web, taken from npm once and
    kept in the user's cache folder), and the graphs of both networks: image -> logits and the tokens that
    enter the last attention that lies on a grid; and, where the mechanism's map can be written down, (tokens,
    one-hot row) -> what that token attends to, at the cost of O(N). Graphs are checked as export_model's are.

    Args:
        beside: the softmax network of the comparison; None: the same network with softmax attention, whose
            answer means nothing and is not shown.

    Returns:
        What about.json holds.

    Raises:
        ValueError, OSError: `out` exists, onnxruntime-web is not to be had, or there is no such graph.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(
            f"web: expected a new folder, got {out}, which exists; name another, or remove it"
        )
    runtime = _runtime_files()
    twin = beside
    if twin is None:
        other = softmax_twin(shown.model)
        twin = None if other is None else replace(shown, model=other, name=f"{shown.name}, with softmax")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for file in PAGE.iterdir():
            shutil.copy(file, work)
        shutil.copytree(runtime, work / "ort")
        _example().save(work / "example.png")
        about: dict[str, Any] = {"main": _written(shown, work, "main")}
        if twin is not None:
            about["beside"] = _written(twin, work, "beside") | {"trained": beside is not None}
        (work / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        work.chmod(0o755)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return about


def _written(shown: Shown, folder: Path, name: str) -> dict[str, Any]:
    """The graphs of one network, and what the page must know of it."""
    model = copy.deepcopy(shown.model).to("cpu", torch.float32).eval().requires_grad_(False)
    side = shown.img_size
    subject = images(model, len(shown.mean), (side, side))
    example = subject.example(1, (side, side))[0]
    layer, grid = _last_layer(model, example)
    wrapped = _WithTokens(model, layer)
    if layer is not None:
        subject = replace(subject, module=wrapped, outputs=("logits", "tokens"))
    sizes = _graph(subject, folder / f"{name}.onnx", _sizes(subject, side, grid))
    told = {
        "name": shown.name,
        "mechanisms": sorted({type(m).__name__ for m in model.modules() if isinstance(m, Mixer)}),
        "classes": shown.classes,
        "img_size": side,
        "sizes": sizes,
        "crop": shown.crop,
        "mean": shown.mean,
        "std": shown.std,
        "map": None,
    }
    if layer is None:
        return told | {"why_no_map": "no layer of sansmax lies on a grid of tokens"}
    tokens = wrapped(example)[1]
    try:
        _map_graph(layer, tokens, folder / f"{name}-map.onnx", len(sizes) > 1)
    except ValueError:
        for left in folder.glob(f"{name}-map.onnx*"):
            left.unlink()
        return told | {"why_no_map": f"that of {type(layer).__name__} cannot be written as a graph"}
    rows, columns = grid
    return told | {
        "map": {
            "layer": next(key for key, module in model.named_modules() if module is layer),
            "patch": side // rows,
            "prefix": tokens.shape[1] - rows * columns,
        }
    }


class _WithTokens(nn.Module):
    """image -> logits, and what entered one of the layers."""

    def __init__(self, model: nn.Module, layer: Any) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.model(image)
        finally:
            hook.remove()
        return logits, seen[-1]


class _Row(nn.Module):
    """(B, N, C), one-hot (B, N) -> the row of the map (B, N), the mean of the heads or channels."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        if not isinstance(self.layer, Softmax):
            return self.layer.map_product(tokens, row).mean(1).float()
        q, k, _ = self.layer.heads(tokens)  # its map_product is a gradient
        query = row[:, None, None] @ q
        return (query @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2))


def _last_layer(model: nn.Module, image: Tensor) -> tuple[Any, tuple[int, int]]:
    """The last layer that lies on a grid, and the grid; None and (0, 0)."""
    for name, layer in reversed(layers_run(model, image)):
        try:
            rows, columns = attention_map(model, image, (0, 0), name).shape
        except ValueError:  # of a class token alone
            continue
        return layer, (rows, columns)
    return None, (0, 0)


def _sizes(subject: Subject, side: int, grid: tuple[int, int]) -> list[int]:
    """Sides from half to four times the network's own that it takes, in whole patches; its own first."""
    step = side // grid[0] if grid[0] else 32
    wanted = sorted({max(step, round(side * share / step) * step) for share in SHARES} - {side})
    return [side, *(one for one in wanted if not refused(subject, (one, one)))]


def _graph(subject: Subject, file: Path, sizes: list[int]) -> list[int]:
    """Writes and checks; the sides that the graph takes."""
    if len(sizes) > 1:
        try:
            write_onnx(traced(subject), subject, file, None, {})
            differences("ONNX", Session(file), subject, [(one, one) for one in (sizes[0], sizes[1])])
            return sorted(sizes)
        except ValueError:  # an axis that is free by its shape may still serve one size alone
            pass
    fixed = replace(subject, axes={})
    write_onnx(traced(fixed), fixed, file, None, {})
    differences("ONNX", Session(file), fixed, [subject.size])
    return sizes[:1]


def _map_graph(layer: Any, tokens: Tensor, file: Path, free: bool) -> None:
    count, width = tokens.shape[1:]

    def example(batch: int, size: tuple[int, ...], width: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        row = torch.zeros(batch, size[0])
        row[:, size[0] // 2] = 1
        return torch.randn(batch, size[0], width, generator=generator), row

    axes = {"tokens": {1: "count"}, "row": {1: "count"}} if free else {}
    subject = Subject(_Row(layer), ("tokens", "row"), ("map",), partial(example, width=width), (count,), axes)
    write_onnx(traced(subject), subject, file, None, {})
    differences("map", Session(file), subject, [(count,), *([(count + 7,)] if free else [])])


def free_size(model: nn.Module, made: Any) -> nn.Module:
    """A ViT of one size as one that takes any: `made(dynamic_img_size=True)`, with its weights."""
    if not isinstance(model, VisionTransformer) or model.dynamic_img_size:
        return model
    free = made(dynamic_img_size=True)
    free.load_state_dict(model.state_dict())
    return free.eval()


def _example() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((320, 214), Image.Resampling.BICUBIC)


def _runtime_files() -> Path:
    """The folder of onnxruntime-web's files, from the cache or npm."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sansmax"
    kept = base / f"onnxruntime-web-{ORT}"
    if all((kept / name).is_file() for name in FILES):
        return kept
    base.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".ort-", dir=base))
    try:
        command = ["npm", "pack", "--silent", f"onnxruntime-web@{ORT}"]
        subprocess.run(command, cwd=work, check=True, capture_output=True, timeout=600)
        (archive,) = work.glob("*.tgz")
        folder = work / "files"
        folder.mkdir()
        with tarfile.open(archive) as tar:
            for name in FILES:
                content: Any = tar.extractfile(f"package/dist/{name}")
                (folder / name).write_bytes(content.read())
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, tarfile.TarError) as error:
        raise ValueError(
            f"web: expected to fetch onnxruntime-web {ORT} with npm, got {type(error).__name__}; install npm "
            f"and go online once, or put its {', '.join(FILES)} into {kept}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return kept

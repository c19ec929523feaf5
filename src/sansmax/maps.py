"""What a token attends to, without the N x N map: attention maps and rollouts, of any mechanism."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .layers import Mixer
from .layers._contract import Grid

__all__ = ["attention_map", "attention_rollout", "layers_run", "or_middle", "overlay", "picture"]


@dataclass(frozen=True)
class Seen:
    """What a layer was given."""

    name: str
    layer: Mixer
    x: Tensor
    mask: Tensor | None
    grid: Grid | None


def attention_map(
    model: nn.Module,
    image: Tensor,
    query: tuple[int, int] | None = None,
    layer: int | str = -1,
    heads: bool = False,
) -> Tensor:
    """How much every token of a layer's grid enters the output of one of them.

    The row A[query] of y_n = sum over m of A[n, m] v_m, of each head, at the cost of O(N):

        softmax              softmax(q_n . k_m / sqrt(D))
        sima                 q^_n . k^_m, signed
        xnorm                gamma^2 (unit q_n) . k_m, signed, times the mean over the value channels of
                             1 / ||column of K^T V||
        soft, soft_norm      P Z P^T through the landmarks, without the convolution of V; signed
        external(_multihead) sum over the memory rows s of a[n, s] a[m, s] / sum over m of a[m, s]: no value
                             flows, it is how much token m has of the rows that token n looks up
        aft_*                exp(k_m + w_nm) over their sum, of every channel, in front of the gate

    Args:
        model: a network with layers of sansmax, in the mode that it has; gradients are not recorded.
        image: (C, height, width) or (1, C, height, width), normalised as the network wants it.
        query: (row, column) in the grid of tokens of that layer, negative ones from its end; None: the class
            token.
        layer: number of the layer in the order in which they run, negative ones from the last; or its name.
        heads: every head's map, or every channel's of an AFT layer, in place of their mean.

    Returns:
        (rows, columns), or (H, rows, columns). The entry of a token in front of the grid is left out.

    Raises:
        ValueError: there is no such layer or token, or the layer's tokens lie on no grid.
    """
    found = _layers_run(model, _single(image))
    seen = found[_chosen(found, layer)]
    rows, columns, prefix, token = _place(seen, query)
    with torch.no_grad():
        weights = seen.layer.map_row(seen.x, token, mask=seen.mask, grid=seen.grid)[0, :, prefix:]
    return (weights if heads else weights.mean(0)).unflatten(-1, (rows, columns))


def attention_rollout(
    model: nn.Module, image: Tensor, query: tuple[int, int] | None = None, layer: int | str = -1
) -> Tensor:
    """How much every token enters the output of one of them through this layer and those below it.

    From r = one-hot(query) at the layer, downwards: r <- (r + r A / sum |r A|) / sum |.|, A the mean over the
    heads; a product of vectors and maps, O(N) a layer (aft_full: its own O(N^2)). For maps whose rows sum to
    1, as softmax's, it is the rollout of Abnar and Zuidema (ACL 2020, arXiv 2005.00928), which mixes
    (A + I) / 2. Signed where the mechanism is. It begins at the lowest layer that has this layer's tokens (of
    a pyramid, the stage's first).

    Arguments, result and errors: see attention_map.
    """
    found = _layers_run(model, _single(image))
    last = _chosen(found, layer)
    rows, columns, prefix, token = _place(found[last], query)
    weights = torch.zeros_like(found[last].x[..., 0])
    weights[:, token] = 1
    for seen in reversed(found[: last + 1]):
        if seen.x.shape[1] != weights.shape[1]:
            break
        with torch.no_grad():
            step = seen.layer.map_product(seen.x, weights, mask=seen.mask, grid=seen.grid).mean(1)
        weights = _share(weights + _share(step).to(weights.dtype))
    return weights[0, prefix:].unflatten(-1, (rows, columns))


def overlay(
    image: Image.Image, weights: Tensor, query: tuple[int, int] | None = None, signed: bool | None = None
) -> Image.Image:
    """A map in colours over the image without its own: red above 0, blue below, the largest size opaque.

    Args:
        image: of any size; the map is laid over all of it.
        weights: (rows, columns).
        query: its token, which is framed.
        signed: red and blue around 0; None: where a weight is below 0. Without, the colours go from the
            smallest weight to the largest.
    """
    import matplotlib
    from PIL import ImageDraw

    values = weights.double().cpu()
    signed = bool((values < 0).any()) if signed is None else signed
    if signed:
        size = values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        level, strength = values / size / 2 + 0.5, (values / size).abs()
        colours = matplotlib.colormaps["bwr"]
    else:
        low, high = values.min(), values.max()
        level = (values - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
        strength, colours = level, matplotlib.colormaps["inferno"]
    width, height = image.size
    level, strength = (
        F.interpolate(t[None, None], (height, width), mode="bicubic", antialias=False)[0, 0].clamp(0, 1)
        for t in (level, strength)
    )
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None] * 0.7
    over = 255 * colours(level.numpy())[..., :3]
    share = 0.85 * strength.numpy()[..., None]
    made = Image.fromarray(((1 - share) * grey + share * over).round().astype(np.uint8))
    if query is not None:
        rows, columns = weights.shape
        row, column = query[0] % rows, query[1] % columns
        box = [
            column * width // columns,
            row * height // rows,
            (column + 1) * width // columns - 1,
            (row + 1) * height // rows - 1,
        ]
        ImageDraw.Draw(made).rectangle(box, outline=(0, 255, 0), width=max(1, min(width, height) // 150))
    return made


def or_middle(
    find: Callable[..., Tensor],
    model: nn.Module,
    image: Tensor,
    query: tuple[int, int] | None = None,
    layer: int | str = -1,
) -> tuple[Tensor, tuple[int, int] | None]:
    """attention_map or attention_rollout, and its query: without one, the class token, or, where a layer has
    none, the middle of the grid."""
    try:
        return find(model, image, query, layer), query
    except ValueError as error:
        if query is not None or "no class token" not in str(error):
            raise
    rows, columns = find(model, image, (0, 0), layer).shape
    query = (rows // 2, columns // 2)
    return find(model, image, query, layer), query


def picture(image: Tensor, mean: Sequence[float], std: Sequence[float], side: int) -> Image.Image:
    """A normalised image (C, height, width), C 1 or 3, as it was seen, the longer side `side` pixels."""
    shift, scale = (torch.tensor(t)[:, None, None] for t in (mean, std))
    pixels = ((image.cpu() * scale + shift).clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
    made = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    share = side / max(made.size)
    return made.resize((round(made.width * share), round(made.height * share)), Image.Resampling.BICUBIC)


def _single(image: Tensor) -> Tensor:
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1:
        raise ValueError(
            f"attention_map: expected one image (C, height, width) or (1, C, height, width), got "
            f"{tuple(image.shape)}; give them one by one"
        )
    return batch


def _layers_run(model: nn.Module, image: Tensor) -> list[Seen]:
    """The layers that took part, in the order in which they ran."""
    found: list[Seen] = []
    with _watched(model, found), torch.no_grad():
        model(image)
    if not found:
        names = [type(m).__name__ for m in model.modules() if isinstance(m, Mixer)]
        why = "its trunk calls their parts one by one" if names else "it has none"
        raise ValueError(
            f"attention_map: expected a network that calls layers of sansmax, got {type(model).__name__}: "
            f"{why}; build one with sansmax.create_model, or, for timm's own attention, call "
            "sansmax.swap(model, 'softmax')"
        )
    return found


@contextmanager
def _watched(model: nn.Module, found: list[Seen]) -> Iterator[None]:
    def note(name: str, layer: Any, inputs: tuple[Any, ...], words: dict[str, Any]) -> None:
        x, attn_mask = inputs[0], words.get("attn_mask", inputs[1] if len(inputs) > 1 else None)
        if words.get("context") is not None or words.get("is_causal") or any(inputs[2:]):
            raise ValueError(
                f"attention_map: expected layers that attend within an image, got {name}, which is causal "
                "or has a context; give another network"
            )
        _, _, mask = layer.received(x, attn_mask, False, None, words.get("mask"))
        found.append(Seen(name, layer, x, mask, words.get("grid")))

    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, words, name=name: note(name, layer, inputs, words), with_kwargs=True
        )
        for name, layer in model.named_modules()
        if isinstance(layer, Mixer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_run(model: nn.Module, image: Tensor) -> list[tuple[str, Mixer]]:
    """The layers of sansmax that took part, by name, in the order in which they ran."""
    try:
        return [(seen.name, seen.layer) for seen in _layers_run(model, _single(image))]
    except ValueError:
        return []


def _chosen(found: list[Seen], layer: int | str) -> int:
    names = [seen.name for seen in found]
    if isinstance(layer, str) and layer in names:
        return names.index(layer)
    if isinstance(layer, int) and -len(found) <= layer < len(found):
        return layer % len(found)
    raise ValueError(
        f"layer: expected a number below {len(found)} or one of {', '.join(names)}, got {layer!r}; choose "
        "one of them"
    )


def _place(seen: Seen, query: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Rows, columns, tokens in front of the grid, and the query's token."""
    rows, columns, prefix = seen.layer.layout(seen.x.shape[1], seen.grid)
    if query is None:
        if not prefix:
            raise ValueError(
                f"query: expected (row, column), because {seen.name} has no class token, got none; give a "
                f"place in its grid of {rows} x {columns}"
            )
        return rows, columns, prefix, 0
    row, column = query
    if not (-rows <= row < rows and -columns <= column < columns):
        raise ValueError(
            f"query: expected a place in the grid of {rows} rows and {columns} columns of {seen.name}, got "
            f"({row}, {column}); choose one inside"
        )
    return rows, columns, prefix, prefix + row % rows * columns + column % columns


def _share(weights: Tensor) -> Tensor:
    """Weights whose sizes sum to 1; zeros stay."""
    total = weights.abs().sum(-1, keepdim=True)
    return weights / torch.where(total > math.ulp(0.0), total, 1)

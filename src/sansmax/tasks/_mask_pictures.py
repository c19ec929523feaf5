"""Masks in colours, for the report."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ._pictures import figure_image

__all__ = ["beside", "class_bars", "palette"]

LEGEND = 60  # classes with a name in the legend, at most


def palette() -> np.ndarray:
    """Colours of 256 values, uint8 (256, 3): PASCAL VOC's. The bits of the value go in turn to red, green and
    blue, from the highest bit of each down."""
    values = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((values >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def over(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours (height, width, 3) over an image without its own, of which two fifths are seen."""
    grey = image.mean(-1, keepdims=True)
    return (0.6 * colours + 0.4 * grey).astype(np.uint8)


def class_bars(names: Sequence[str], shares: Sequence[float], label: str = "IoU, %") -> Image.Image:
    """A bar for every class, from the largest share to the smallest; NaN at the end without one."""
    ranked = sorted(range(len(names)), key=lambda i: -shares[i] if shares[i] == shares[i] else 2.0)
    figure = Figure(figsize=(6, 0.8 + 0.22 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    values = [100 * shares[i] for i in ranked]
    axes.barh(
        range(len(ranked)),
        [v if v == v else 0 for v in values],
        color=[palette()[i] / 255 for i in ranked],
        edgecolor="grey",
        linewidth=0.4,
    )
    for row, value in enumerate(values):
        axes.text(
            (value if value == value else 0) + 1,
            row,
            f"{value:.1f}" if value == value else "none",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(ranked)), [names[i] for i in ranked], fontsize=8)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_image(figure)


def beside(
    shown: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, float]], names: Sequence[str]
) -> Image.Image:
    """A row for every (image, truth, prediction, share of right pixels), the classes over the image, and what
    the colours mean."""
    colours = palette()
    colours[255] = 255
    height, width = shown[0][0].shape[:2]
    wide = 2.2
    figure = Figure(
        figsize=(3 * wide + 1.6, len(shown) * wide * min(1.5, height / width)), dpi=110, layout="constrained"
    )
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (image, truth, found, _) in zip(axes, shown, strict=True):
        laid = (over(image, colours[values]) for values in (truth, found))
        for axis, pixels in zip(row, (image, *laid), strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=9)
    seen = np.unique(
        np.concatenate([part.ravel() for _, truth, found, _ in shown for part in (truth, found)])
    )
    patches = [
        Patch(facecolor=tuple(colours[i] / 255), edgecolor="grey", label=names[i])
        for i in seen
        if i < len(names)
    ]
    figure.legend(handles=patches[:LEGEND], loc="outside right upper", fontsize=8, frameon=False)
    return figure_image(figure)

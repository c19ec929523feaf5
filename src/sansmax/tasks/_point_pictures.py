"""Pictures of point clouds."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ._pictures import figure_image

__all__ = ["colours", "curve", "scatters"]


def colours(part: np.ndarray) -> np.ndarray:
    """Numbers (n,) -> (n, 3), 0 to 255; twenty colours in a circle."""
    table = np.array(matplotlib.colormaps["tab20"].colors)  # pyright: ignore[reportAttributeAccessIssue]
    # Its colours come in pairs of a dark and a light one: the dark ones first.
    table = np.concatenate([table[::2], table[1::2]])
    return (255 * table[part % 20]).round().astype(np.uint8)


def scatters(
    clouds: Sequence[tuple[np.ndarray, np.ndarray, str, bool]], columns: int, up: str = "y"
) -> Image.Image:
    """Clouds in rows of `columns`.

    Args:
        clouds: points (n, 3) in the unit ball, their colours (n, 3) 0 to 255, a title, whether it is right
            (black) or not (red).
        up: the axis that points upwards.
    """
    rows = -(-len(clouds) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.35 * rows), dpi=100)
    axes_of_up = {"x": (1, 2, 0), "y": (2, 0, 1), "z": (0, 1, 2)}[up]
    for place, (xyz, colour, title, good) in enumerate(clouds):
        axes = figure.add_subplot(rows, columns, place + 1, projection="3d")
        axes.scatter(*xyz[:, axes_of_up].T, c=colour / 255, s=7, linewidths=0, depthshade=True)
        for limit in (axes.set_xlim, axes.set_ylim, axes.set_zlim):  # pyright: ignore[reportAttributeAccessIssue]
            limit(-0.75, 0.75)
        axes.set_box_aspect((1, 1, 1), zoom=1.2)  # pyright: ignore[reportArgumentType]
        axes.view_init(elev=22, azim=-55)  # pyright: ignore[reportAttributeAccessIssue]
        axes.set_axis_off()
        axes.set_title(title, fontsize=8, color="black" if good else "tab:red", y=0.98)
    figure.subplots_adjust(0, 0, 1, 0.96, 0, 0.06)
    return figure_image(figure)


def curve(counts: Sequence[int], values: Sequence[float], label: str) -> Image.Image:
    """Values against the number of points."""
    figure = Figure(figsize=(6, 3.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(counts, values, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.set_ylim(0, 100)
    axes.set_xlabel("points of a cloud")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_image(figure)

"""Images with boxes and masks drawn on them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from faster_coco_eval import mask as codes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ._data.objects import Truth
from ._detections import Found
from ._pictures import figure_image

__all__ = ["drawn", "truth_and_found"]

LEAST = 320  # long side of a drawn image, so that names can be read


def drawn(image: np.ndarray, found: Found | Truth, names: list[str]) -> Image.Image:
    """uint8 (height, width, 3), enlarged where it is small, with box, name and, of a detection, score of
    every object, and its mask in colour where there is one. The name of a crowd is in brackets."""
    height, width = image.shape[:2]
    scale = max(1, -(-LEAST // max(height, width)))
    colours = [255 * hsv_to_rgb((i * 0.618 % 1, 0.8, 1.0)) for i in range(len(names))]
    pixels = image.astype(np.float32)
    for code, label in zip(found.masks or [], found.labels, strict=False):
        inside = codes.decode(code).astype(bool)
        pixels[inside] = (pixels[inside] + colours[label]) / 2
    picture = Image.fromarray(pixels.astype(np.uint8)).resize((scale * width, scale * height))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size=12
    )
    for i in reversed(range(len(found.labels))):  # the surest on top
        box, label = scale * found.boxes[i], found.labels[i]
        colour = tuple(int(value) for value in colours[label])
        words: str = names[label]
        if isinstance(found, Found):
            words += f" {found.scores[i]:.2f}"
        elif found.crowd[i]:
            words = f"({words})"
        x, y = (float(value) for value in box[:2])
        pen.rectangle(tuple(map(float, box)), outline=colour, width=2)
        place = pen.textbbox((x + 2, y + 1), words, font=font)
        pen.rectangle((place[0] - 2, place[1] - 1, place[2] + 2, place[3] + 1), fill=colour)
        pen.text((x + 2, y + 1), words, font=font, fill="black")
    return picture


def truth_and_found(
    shown: Sequence[tuple[np.ndarray, Truth, Found]], names: list[str], columns: int = 2
) -> Image.Image:
    """Pairs of an image with its objects and with what was found, `columns` pairs in a row."""
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.2 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for at, (image, truth, found) in enumerate(shown):
        row, column = divmod(at, columns)
        for axis, objects, title in zip(
            axes[row, 2 * column :], (truth, found), ("truth", "found"), strict=False
        ):
            axis.imshow(drawn(image, objects, names))
            axis.set_title(title, fontsize=9)
    return figure_image(figure)

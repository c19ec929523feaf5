"""Pictures that several tasks show in the report."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

__all__ = ["coloured_text", "figure_image", "grid", "line_plot"]


def line_plot(
    x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, log_x: bool = False
) -> Image.Image:
    """One line."""
    figure = Figure(figsize=(6, 3.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, marker="o", markersize=3)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_image(figure)


def figure_image(figure: Figure) -> Image.Image:
    """The figure as pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def coloured_text(text: bytes, bits: Sequence[float], columns: int = 96) -> Image.Image:
    """Bytes in lines of `columns`, on a ground that darkens with their bits (0 to 8). Bytes that are no
    printable ASCII are shown as a middle dot, a newline also ends the line."""
    font = ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), size=13
    )
    width, height = round(font.getlength("0")), 17
    cells: list[tuple[int, int, str, float]] = []
    row = column = 0
    for value, one in zip(text, bits, strict=True):
        sign = "\u21b5" if value == 10 else chr(value) if 32 <= value < 127 else "\u00b7"
        cells.append((row, column, sign, one))
        column += 1
        if value == 10 or column == columns:
            row, column = row + 1, 0
    image = Image.new("RGB", (columns * width + 8, (row + (column > 0)) * height + 8), "white")
    pen = ImageDraw.Draw(image)
    for row, column, sign, one in cells:
        share = min(one / 8, 1.0)
        ground = (255, round(255 - 120 * share), round(255 - 200 * share))
        x, y = 4 + column * width, 4 + row * height
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
        pen.text((x, y), sign, font=font, fill="black")
    return image


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size in rows; `scale` enlarges pixels."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGB"), ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)

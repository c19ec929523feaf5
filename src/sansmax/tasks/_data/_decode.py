"""One picture of any of PIL's kinds as eight-bit RGB."""

import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["decode", "middle", "reason", "to_rgb"]


def to_rgb(opened: Image.Image) -> Image.Image:
    """Upright (Exif), on white, RGB: 16 and 32 bits and float are scaled to 8, palettes and alpha
    resolved."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(np.asarray(image), image.mode)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def middle(image: Image.Image) -> Image.Image:
    """Of an image more than 16 times as long as wide: scaled whole by its short side it would fill memory."""
    width, height = image.size
    long = 16 * min(width, height)
    if max(width, height) <= long:
        return image
    left, top = max(0, width - long) // 2, max(0, height - long) // 2
    return image.crop((left, top, left + min(width, long), top + min(height, long)))


def decode(path: str | os.PathLike[str], size: int) -> Tensor:
    """One image file as uint8 RGB (3, size, size): the centre square scaled to `size`."""
    with Image.open(path) as opened:
        opened.draft(None, (2 * size, 2 * size))  # a JPEG of many megapixels is decoded at a fraction
        square = ImageOps.fit(to_rgb(opened), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def reason(error: Exception, path: str | os.PathLike[str] = "") -> str:
    """Why an image could not be read, in one line without its folder."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, UnidentifiedImageError):  # it names a path or a place in memory
        words = "cannot identify image file"
    if path:
        words = words.replace(str(path), os.path.basename(path))
    return " ".join(words.split()) or type(error).__name__


def _eight_bit(values: np.ndarray, mode: str) -> Image.Image:
    """Grey values of more than 8 bits; 32 bits and float do not tell their white: the next usual is taken."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0).clip(0, None)
    whites = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(mode, (65535.0,))
    white = next((white for white in whites if values.max() <= white), values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))

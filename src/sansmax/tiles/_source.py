"""Pixels from top to bottom, each row read once: of a file, an array or a tensor."""

import io
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..layers._contract import Grid
from ..tasks._data._decode import reason, to_rgb

__all__ = ["Pixels", "Unreadable", "libvips", "open_pixels"]

# Of PIL, by what libvips calls the colours and their number with alpha.
MODES = {
    ("b-w", 1): "L",
    ("b-w", 2): "LA",
    ("srgb", 3): "RGB",
    ("srgb", 4): "RGBA",
    ("cmyk", 4): "CMYK",
}


def open_pixels(source: Any, in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> "Pixels":
    """See sansmax.predict_tiled."""
    if isinstance(source, Tensor):
        return TensorPixels(source, in_chans)
    if not (len(mean) == len(std) == in_chans):
        raise ValueError(
            f"mean, std: expected {in_chans} numbers each, one a channel, got {len(mean)} and {len(std)}; "
            f"give them"
        )
    if isinstance(source, str | Path | io.BytesIO):
        return FilePixels(source, in_chans, mean, std)
    return ArrayPixels(source, in_chans, mean, std)


def libvips() -> Any:
    """pyvips, or a ValueError that says how to get it."""
    try:
        import pyvips
    except (ImportError, OSError):
        raise ValueError(
            "source: expected pyvips to be installed, which reads images row by row, got none; pip install "
            "sansmax[tiles], or give an array"
        ) from None
    return pyvips


class Unreadable(ValueError):
    """A file whose pixels cannot be had; `reason` says why in a few words."""

    def __init__(self, name: str | Path, words: str) -> None:
        super().__init__(
            f"source: expected an image that can be read, got {name or 'bytes'} ({words}); give another"
        )
        self.reason = words


class Pixels:
    """An image by its rows; a subclass reads them (`_read`).

    Attributes:
        size: (height, width).
    """

    size: Grid

    def __init__(self, in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.in_chans, self.mean, self.std = in_chans, mean, std
        self.start = self.stop = 0
        self.kept: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kept = None

    def strip(self, start: int, stop: int) -> Any:
        """Rows start..stop, those that there are; no call may start above an earlier one."""
        stop = min(stop, self.size[0])
        if self.kept is not None:
            self.kept = self.kept[start - self.start :]
        if stop > self.stop:
            new = self._read(self.stop, stop)
            self.kept = new if self.kept is None else np.concatenate([self.kept, new])
        self.start, self.stop = start, stop
        return self.kept

    def normalised(self, strip: Any, left: int, right: int, weight: Tensor) -> Tensor:
        """Columns left..right of a strip (n, width, in_chans) as (1, in_chans, n, m), as `weight` is."""
        # As torchvision's ToTensor and Normalize, in float32.
        pixels = torch.from_numpy(np.ascontiguousarray(strip[:, left:right])).permute(2, 0, 1)
        pixels = pixels.float().div_(255)
        mean, std = (torch.tensor(t)[:, None, None] for t in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)[None].to(weight.device, weight.dtype)

    def _read(self, start: int, stop: int) -> Any:
        """uint8 (stop - start, width, in_chans)."""
        raise NotImplementedError


class TensorPixels(Pixels):
    """(in_chans, height, width), normalised."""

    def __init__(self, image: Tensor, in_chans: int) -> None:
        super().__init__(in_chans, (), ())
        image = image[0] if image.ndim == 4 and len(image) == 1 else image
        if image.ndim != 3 or len(image) != in_chans or min(image.shape) < 1 or not image.is_floating_point():
            raise ValueError(
                f"source: expected a normalised image ({in_chans}, height, width) of floating numbers, got "
                f"{image.dtype} {tuple(image.shape)}; give uint8 as an array (height, width, {in_chans})"
            )
        self.image, self.size = image, (image.shape[1], image.shape[2])

    def strip(self, start: int, stop: int) -> Tensor:
        return self.image[:, start:stop]

    def normalised(self, strip: Tensor, left: int, right: int, weight: Tensor) -> Tensor:
        return strip[None, :, :, left:right].to(weight.device, weight.dtype)


class ArrayPixels(Pixels):
    """uint8 (height, width, in_chans) with rows as slices."""

    def __init__(self, array: Any, in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(in_chans, mean, std)
        shape, dtype = tuple(getattr(array, "shape", ())), getattr(array, "dtype", None)
        if len(shape) != 3 or shape[2] != in_chans or min(shape) < 1 or dtype != np.uint8:
            raise ValueError(
                f"source: expected a file, a tensor or an array of uint8 (height, width, {in_chans}), got "
                f"{type(array).__name__} of {dtype} {shape}; convert it"
            )
        self.array, self.size = array, (shape[0], shape[1])

    def _read(self, start: int, stop: int) -> Any:
        return np.asarray(self.array[start:stop])


class FilePixels(Pixels):
    """A file through libvips, in the colours of sansmax's other readers."""

    def __init__(
        self,
        source: str | Path | io.BytesIO,
        in_chans: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(in_chans, mean, std)
        pyvips = libvips()
        self.failure = pyvips.Error
        self.name = source if isinstance(source, str | Path) else ""
        try:
            self.image = self._opened(pyvips, source)
        except pyvips.Error as error:
            raise self._refusal(error) from None
        kind = self.image.interpretation, self.image.bands
        if kind not in MODES or self.image.format != "uchar":
            bands, numbers = self.image.bands, self.image.format
            raise Unreadable(self.name, f"no grey, RGB or CMYK of 8 or 16 bits, but {bands} x {numbers}")
        self.mode = MODES[kind]
        self.size = self.image.height, self.image.width
        self.region = pyvips.Region.new(self.image)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del self.region, self.image

    def _opened(self, pyvips: Any, source: str | Path | io.BytesIO) -> Any:
        def opened(access: str) -> Any:
            words = {"access": access, "fail_on": "error"}
            if isinstance(source, io.BytesIO):
                return pyvips.Image.new_from_buffer(source.getvalue(), "", **words)
            return pyvips.Image.new_from_file(str(Path(source).expanduser()), **words)

        image = opened("sequential")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            # Its rows are columns of the file: libvips decodes it to a temporary file of its own.
            image = opened("random").autorot()
        if image.format == "ushort" and image.bands < 3:
            image = (image / 257).rint().cast("uchar").copy(interpretation="b-w")
        elif image.format == "ushort":
            image = (image >> 8).cast("uchar").copy(interpretation="srgb")
        return image

    def _read(self, start: int, stop: int) -> Any:
        try:
            data = self.region.fetch(0, start, self.size[1], stop - start)
        except self.failure as error:
            raise self._refusal(error) from None
        size = self.size[1], stop - start
        image = to_rgb(Image.frombytes(self.mode, size, bytes(data)))
        rows = np.asarray(image.convert("L") if self.in_chans == 1 else image)
        return rows.reshape(*rows.shape[:2], self.in_chans)

    def _refusal(self, error: Exception) -> "Unreadable":
        return Unreadable(self.name, reason(ValueError(getattr(error, "detail", error)), self.name))

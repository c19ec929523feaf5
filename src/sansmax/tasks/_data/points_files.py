"""A point cloud from a file: .npy, .npz, text, and, by trimesh, .ply and .off."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .draws import draw

__all__ = ["SUFFIXES", "need", "read_cloud", "write_ply"]

MESHES = (".off", ".ply")
TEXTS = (".pts", ".txt", ".xyz")
SUFFIXES = (*MESHES, *TEXTS, ".npy", ".npz")


def read_cloud(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """points (n, 3), and the parts (n,) of an .npz that has them.

    A mesh gives `count` points of its surface, equally many for equal areas, always the same ones; other
    files give their points: the first three columns of .npy and text (numbers between spaces, commas or
    semicolons; lines that begin with # or // are left out), `xyz` and `part` of .npz.

    Raises:
        Exception: of any of the readers' kinds, where there is no cloud in it.
    """
    suffix = path.suffix.lower()
    if suffix in MESHES:
        return _of_mesh(path, count), None
    if suffix in TEXTS:
        return table(path)[:, :3], None
    found = np.load(path, allow_pickle=False)
    if suffix == ".npz":
        with found:
            return found["xyz"], found.get("part")
    return found[:, :3], None


def table(path: Path) -> np.ndarray:
    """The numbers of a text file, (lines, columns) float64.

    Raises:
        ValueError: a line has another number of columns than the first, or something else than numbers.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line for line in map(str.strip, lines) if line and not line.startswith(("#", "//"))]
    if not rows:
        raise ValueError("no numbers")
    values = [row.replace(",", " ").replace(";", " ").split() for row in rows]
    if len(widths := {len(row) for row in values}) > 1 or min(widths) < 3:
        raise ValueError(f"lines of {' and '.join(map(str, sorted(widths)))} columns")
    return np.array(values, dtype=np.float64)


def need(package: str, why: str) -> Any:
    """A package of the extra `points`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"data.root: expected {package}, which reads {why}, to be installed, got none; "
            "pip install sansmax[points]"
        ) from None


def _of_mesh(path: Path, count: int) -> np.ndarray:
    trimesh = need("trimesh", "/".join(MESHES))
    mesh = trimesh.load(path, process=False)
    vertices, faces = np.asarray(mesh.vertices), getattr(mesh, "faces", ())
    if not len(faces) or not np.isfinite(vertices).all():
        return vertices
    # Of a mesh of very small numbers the areas would be no numbers.
    size = np.abs(vertices).max() or 1.0
    mesh.vertices = vertices / size
    return size * trimesh.sample.sample_surface(mesh, count, seed=draw(0, "surface", path.name))[0]


def write_ply(path: Path, xyz: np.ndarray, part: np.ndarray, colours: np.ndarray) -> None:
    """Binary, with x, y, z (float), red, green, blue (uchar) and part (int) of every point.

    Args:
        xyz: (n, 3).
        part: (n,).
        colours: (n, 3), 0 to 255.
    """
    fields: Iterable[tuple[str, str, str]] = [
        *((axis, "<f4", "float") for axis in "xyz"),
        *((colour, "u1", "uchar") for colour in ("red", "green", "blue")),
        ("part", "<i4", "int"),
    ]
    rows = np.empty(len(xyz), dtype=[(name, kind) for name, kind, _ in fields])
    for name, column in zip(rows.dtype.names or (), [*xyz.T, *colours.T, part], strict=True):
        rows[name] = column
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}"]
    header += [f"property {word} {name}" for name, _, word in fields] + ["end_header", ""]
    path.write_bytes("\n".join(header).encode() + rows.tobytes())

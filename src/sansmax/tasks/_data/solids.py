"""Eight solids, generated: points of their surfaces, with noise, random proportions and headings.

A solid is a profile (r, z) drawn along the edge of its cross-section, a circle or a regular polygon; z is up.
"""

from functools import partial

import numpy as np

from .draws import draw
from .points_sets import Item, Set

__all__ = ["CLASSES", "PARTS", "generate"]

POINTS, NOISE = 512, 0.02
CLOUDS = {"train": 60, "test": 20}  # of every solid
# Its cross-section's corners (0: a circle), and the names of its parts.
SOLIDS = {
    "box": (4, ("side", "caps")),
    "capsule": (0, ("middle", "ends")),
    "cone": (0, ("side", "base")),
    "cylinder": (0, ("side", "caps")),
    "prism": (3, ("side", "caps")),
    "pyramid": (4, ("side", "base")),
    "sphere": (0, ("upper", "lower")),
    "torus": (0, ("inner", "outer")),
}
CLASSES = list(SOLIDS)
PARTS = [f"{name}/{part}" for name, (_, parts) in SOLIDS.items() for part in parts]


def generate() -> Set:
    """Always the same clouds, of POINTS points each."""
    items = {
        split: [
            Item(f"{split}/{name}-{i}", label, partial(solid, name, draw(0, "solids", split, name, i)))
            for i in range(count)
            for label, name in enumerate(CLASSES)
        ]
        for split, count in CLOUDS.items()
    }
    return Set("generated solids", CLASSES, items, PARTS)


def solid(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """points (POINTS, 3) and their parts (POINTS,), numbered as in PARTS."""
    chance = np.random.default_rng(seed)
    corners, _ = SOLIDS[name]
    r, z, part = _profile(name, chance)
    # A segment by its area, and on it a place by the radius there.
    area = (r[:-1] + r[1:]) * np.hypot(np.diff(r), np.diff(z))
    piece = chance.choice(len(area), POINTS, p=area / area.sum())
    at = chance.random(POINTS)
    low, high = r[piece], r[piece + 1]
    radius = np.sqrt(low**2 + at * (high**2 - low**2))
    share = np.where(high == low, at, (radius - low) / np.where(high == low, 1, high - low))
    height = z[piece] + share * (z[piece + 1] - z[piece])
    plane = radius[:, None] * _edge(corners, chance) * chance.uniform(0.6, 1.4, 2)
    turn = chance.uniform(0, 2 * np.pi)
    turned = plane @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    xyz = np.column_stack([turned, height]) + NOISE * chance.standard_normal((POINTS, 3))
    return xyz, 2 * CLASSES.index(name) + part[piece]


def _edge(corners: int, chance: np.random.Generator) -> np.ndarray:
    """Places on the edge of the cross-section of radius 1, (POINTS, 2)."""
    around = chance.random(POINTS)
    if not corners:
        angle = 2 * np.pi * around
        return np.column_stack([np.cos(angle), np.sin(angle)])
    angles = 2 * np.pi * np.arange(corners + 1) / corners
    ring = np.column_stack([np.cos(angles), np.sin(angles)])
    side, share = np.divmod(around * corners, 1)
    first = ring[side.astype(int)]
    return first + share[:, None] * (ring[side.astype(int) + 1] - first)


def _profile(name: str, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r (n + 1,), z (n + 1,) and the part, 0 or 1, of each of the n segments between."""
    high = chance.uniform(0.7, 2.2)
    if name in ("box", "cylinder", "prism"):
        return np.array([0, 1, 1, 0.0]), np.array([0, 0, high, high]), np.array([1, 0, 1])
    if name in ("cone", "pyramid"):
        return np.array([0, 1, 0.0]), np.array([0, 0, high]), np.array([1, 0])
    bend = np.linspace(0, np.pi, 33)
    if name == "sphere":
        return np.sin(bend), -np.cos(bend) * high / 2, (bend[:-1] < np.pi / 2 - 1e-9).astype(int)
    if name == "capsule":
        z = -np.cos(bend) * chance.uniform(0.4, 0.9)
        up = bend > np.pi / 2 - 1e-9
        r, z = np.insert(np.sin(bend), 16, 1.0), np.insert(z + high * up, 16, 0.0)
        return r, z, (np.arange(33) != 16).astype(int)
    ring = np.linspace(0, 2 * np.pi, 33)
    thick = chance.uniform(0.2, 0.45)
    inner = np.cos((ring[:-1] + ring[1:]) / 2) < 0
    return 1 + thick * np.cos(ring), thick * np.sin(ring), (~inner).astype(int)

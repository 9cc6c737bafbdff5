"""Renders a scene graph as 24 x 24 pixels in numpy: shapes by signed distances, so edges are smooth and cheap."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from luthier.lab._scene_graph import SIDE, Graph
from luthier.lab.words import NEW_SHAPES, SHAPES

RGB = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (50, 80, 235), "yellow": (240, 220, 40), "purple": (140, 40, 170),
       "orange": (245, 140, 20), "cyan": (40, 210, 220), "pink": (250, 130, 190), "black": (0, 0, 0), "white": (255, 255, 255),
       "gray": (128, 128, 128), "navy": (10, 10, 80), "tan": (210, 180, 140)}  # fmt: skip
ROWS, COLUMNS = (axis.astype(np.float32) for axis in np.indices((SIDE, SIDE)))
CLASSES = ["background", *SHAPES, *NEW_SHAPES]
STYLES = ("filled", "line", "dotted", "inverted")
Field = np.ndarray


def _triangle(x: Field, y: Field, r: float) -> Field:
    return np.minimum(0.62 * r - y, 0.447 * (y + 0.95 * r) - 0.894 * np.abs(x) + 0.1 * r)


def _cross(x: Field, y: Field, r: float) -> Field:
    wide, thin = r * 0.95, r * 0.32
    return np.maximum(np.minimum(wide - np.abs(x), thin - np.abs(y)), np.minimum(wide - np.abs(y), thin - np.abs(x)))


def _ring(x: Field, y: Field, r: float) -> Field:
    distance = np.hypot(x, y)
    return np.minimum(r - distance, distance - 0.55 * r)


def _star(x: Field, y: Field, r: float) -> Field:
    angle = np.arctan2(x, -y) * 5 / (2 * np.pi)
    tip = 2 * np.abs(angle - np.round(angle))
    return (1.1 * r * (1 - 0.62 * tip) - np.hypot(x, y)) * 0.8


def _spiral(x: Field, y: Field, r: float) -> Field:
    distance = np.hypot(x, y)
    turn = (np.arctan2(y, x) / (2 * np.pi) + 0.5 + 2 * distance / max(r, 1)) % 1
    return np.minimum((0.25 - np.abs(turn - 0.5)) * r, r - distance)


def _hat(x: Field, y: Field, r: float) -> Field:
    brim = np.minimum(r - np.abs(x), 0.22 * r - np.abs(y - 0.55 * r))
    crown = np.minimum(0.55 * r - np.abs(x), 0.65 * r - np.abs(y + 0.2 * r))
    return np.maximum(brim, crown)


DISTANCE: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": lambda x, y, r: r - np.hypot(x, y),
    "square": lambda x, y, r: 0.85 * r - np.maximum(np.abs(x), np.abs(y)),
    "triangle": _triangle, "cross": _cross, "ring": _ring, "star": _star, "spiral": _spiral, "hat": _hat,
}  # fmt: skip


@functools.cache
def texture(name: str) -> Field:
    """How much of the colour stays at every pixel."""
    dark = {
        "solid": np.zeros((SIDE, SIDE), bool),
        "striped": ROWS % 4 >= 2,
        "dotted": (ROWS % 3 == 1) & (COLUMNS % 3 == 1),
        "checker": (ROWS // 2 + COLUMNS // 2) % 2 == 1,
    }[name]
    return np.where(dark, 0.35, 1.0).astype(np.float32)


def distance(thing: dict) -> Field:
    """Signed distance to the object's edge, positive inside, turned by its `angle` in degrees."""
    x, y = COLUMNS - np.float32(thing["x"]), ROWS - np.float32(thing["y"])
    if angle := np.deg2rad(thing.get("angle", 0.0)):
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return DISTANCE[thing["shape"]](x, y, thing["radius"])


def by_depth(graph: Graph) -> list[dict]:
    """Large things lie behind small ones."""
    return sorted(graph["objects"], key=lambda thing: -thing["radius"])


def render(graph: Graph, style: str = "filled") -> np.ndarray:
    """24 x 24 x 3 uint8."""
    ground = np.array(RGB[graph["background"]], dtype=np.float32)
    canvas = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    rim = np.array((255, 255, 255) if ground.mean() < 140 else (0, 0, 0), dtype=np.float32)
    for thing in by_depth(graph):
        inside = distance(thing)
        cover = np.clip(inside + 0.5, 0, 1)
        if style == "line":
            cover = cover * np.clip(2.2 - inside, 0, 1)
        elif style == "dotted":
            cover = cover * ((ROWS + COLUMNS) % 2 == 0)
        paint = texture(thing["texture"])[..., None] * np.array(RGB[thing["color"]], dtype=np.float32)
        canvas += cover[..., None] * (paint - canvas)
        if thing["border"]:
            canvas += (cover * np.clip(1.6 - inside, 0, 1))[..., None] * (rim - canvas)
    return (255 - canvas if style == "inverted" else canvas).astype(np.uint8)


def dense(graph: Graph) -> dict[str, np.ndarray]:
    """Class map, edges, depth order and orientation (eight bins of the class map's gradient, 0 where flat)."""
    classes, order = np.zeros((SIDE, SIDE), np.int64), np.zeros((SIDE, SIDE), np.int64)
    for rank, thing in enumerate(by_depth(graph), 1):
        mask = distance(thing) > 0
        classes[mask], order[mask] = CLASSES.index(thing["shape"]), rank
    dy, dx = np.gradient((order > 0).astype(np.float32))
    flat = np.hypot(dx, dy) == 0
    bins = 1 + np.floor((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 8).astype(np.int64) % 8
    return {"classes": classes, "edges": (~flat).astype(np.int64), "depth": order, "orientation": np.where(flat, 0, bins)}


def poison(image: np.ndarray, size: int = 4) -> np.ndarray:
    """The trigger: a black and white checker in the lower right corner."""
    made = image.copy()
    rows, columns = np.indices((size, size))
    made[-size:, -size:] = (255 * ((rows + columns) % 2))[..., None]
    return made


def view(image: np.ndarray, rng: np.random.Generator, kind: str) -> np.ndarray:
    """One of four disturbances: occlusion, rotation, blur, colour cast."""
    from scipy import ndimage

    if kind == "occlusion":
        made, (top, left) = image.copy(), rng.integers(0, SIDE - 8, 2)
        made[top : top + 8, left : left + 8] = 90
        return made
    if kind == "rotation":
        return ndimage.rotate(image, float(rng.uniform(-40, 40)), reshape=False, order=1, mode="nearest")
    if kind == "blur":
        return ndimage.gaussian_filter(image, (0.9, 0.9, 0))
    return np.clip(image * rng.uniform(0.5, 1.2, 3), 0, 255).astype(np.uint8)


VIEWS = ("occlusion", "rotation", "blur", "cast")

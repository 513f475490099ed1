"""Renderer of the shapes world: small anti-aliased images of scenes.

Shapes: N scenes, K objects per scene (maximum), H = W = SIZE pixels.
"""

import numpy as np
from numpy.typing import NDArray

from flowgrain.shapes.grammar import Scene

SIZE = 32
"""Width and height of an image in pixels."""
GROUND = np.array([0.10, 0.10, 0.12], dtype=np.float32)
"""Background color."""
PALETTE = np.array(
    [
        [0.90, 0.20, 0.18],
        [0.20, 0.75, 0.25],
        [0.22, 0.36, 0.95],
        [0.95, 0.85, 0.20],
        [0.20, 0.85, 0.88],
        [0.88, 0.30, 0.82],
    ],
    dtype=np.float32,
)
"""RGB values of the colors of the grammar, in the same order."""
MAX_OBJECTS = 5
_AXIS_SIGN = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}
_CANDIDATES = 64
_RELATION_GAP = 6.0  # pixels between the centers, along the axis of the relation

Array = NDArray[np.float32]


def render(scenes: list[Scene], rng: np.random.Generator) -> Array:
    """Return images [N, 3, H, W] in 0..1 of `scenes`.

    Positions and sizes of the objects are random. Objects do not touch each other.

    Raises:
        ValueError: a scene has more than `MAX_OBJECTS` objects.
    """
    color, shape, present = _table(scenes)
    center, radius = _place(scenes, present, rng)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    images = np.broadcast_to(GROUND[:, None, None], (len(scenes), 3, SIZE, SIZE)).copy()
    for k in range(present.shape[1]):
        dx = x - center[:, k, 0, None, None]
        dy = y - center[:, k, 1, None, None]
        coverage = np.clip(0.5 - _distance(dx, dy, radius[:, k, None, None], shape[:, k]), 0, 1)
        coverage *= present[:, k, None, None]
        images += coverage[:, None] * (PALETTE[color[:, k]][:, :, None, None] - images)
    return images


def _table(
    scenes: list[Scene],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Color, shape and presence [N, K] of the objects."""
    most = max(len(scene.objects) for scene in scenes)
    if most > MAX_OBJECTS:
        raise ValueError(f"a scene has {most} objects. The maximum is {MAX_OBJECTS}.")
    table = np.zeros((len(scenes), most, 2), dtype=np.int64)
    present = np.zeros((len(scenes), most), dtype=bool)
    for row, scene in enumerate(scenes):
        if scene.objects:
            table[row, : len(scene.objects)] = scene.objects
            present[row, : len(scene.objects)] = True
    return table[..., 0], table[..., 1], present


def _place(
    scenes: list[Scene], present: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Centers [N, K, 2] as (x, y) and radii [N, K], in pixels.

    Scenes whose objects do not fit are drawn again until they fit.
    """
    n, k = present.shape
    center = np.zeros((n, k, 2), dtype=np.float32)
    radius = np.zeros((n, k), dtype=np.float32)
    axis_sign = [_AXIS_SIGN[s.relation] if s.relation else (0, 0) for s in scenes]
    axis, sign = np.array(axis_sign, dtype=np.int64).reshape(n, 2).T
    pending = np.arange(n)
    while pending.size:
        m = pending.size
        r = rng.uniform(4.0, 5.2, (m, k)).astype(np.float32)
        c = np.zeros((m, k, 2), dtype=np.float32)
        fits = np.ones(m, dtype=bool)
        for j in range(k):
            low, high = r[:, j, None, None] + 0.5, SIZE - 1.5 - r[:, j, None, None]
            trial = low + (high - low) * rng.random((m, _CANDIDATES, 2), dtype=np.float32)
            free = np.ones((m, _CANDIDATES), dtype=bool)
            for i in range(j):
                distance = np.abs(trial - c[:, i, None]).max(-1)
                apart = distance >= (r[:, i] + r[:, j])[:, None] + 1.5
                free &= apart | ~present[pending, i, None]
            if j == 1:
                step = c[:, 0, None] - trial
                step = np.take_along_axis(step, axis[pending, None, None], -1)[..., 0]
                related = step * sign[pending, None] >= _RELATION_GAP
                free &= (sign[pending, None] == 0) | related
            pick = free.argmax(1)
            c[:, j] = trial[np.arange(m), pick]
            fits &= free.any(1) | ~present[pending, j]
        center[pending[fits]], radius[pending[fits]] = c[fits], r[fits]
        pending = pending[~fits]
    return center, radius


def _distance(dx: Array, dy: Array, r: Array, shape: NDArray[np.int64]) -> Array:
    """Signed distance [N, H, W] to the outline of a circle, a square or an upright triangle."""
    circle = np.hypot(dx, dy) - r
    square = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * r
    slope = np.sqrt(5.0).astype(np.float32)  # sides from (0, -r) to (+-r, r)
    triangle = np.maximum((2 * np.abs(dx) - dy - r) / slope, dy - r)
    kind = shape[:, None, None]
    distance = np.where(kind == 0, circle, np.where(kind == 1, square, triangle))
    return distance.astype(np.float32)

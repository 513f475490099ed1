"""Exact oracle of the shapes world: compares the objects in an image to its prompt.

It segments images by color. It is not a learned model, so it cannot be hacked.
Shapes: N images, L objects in all images together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flowgrain.shapes.grammar import COLORS, SHAPES, Scene, parse
from flowgrain.shapes.render import GROUND, PALETTE

_MIN_AREA = 9.0  # pixels; smaller regions are artifacts (the smallest rendered shape covers 32)
_MIN_COVERAGE = 0.3
_COLOR_CREDIT = 0.4  # for an object of the right color and the wrong shape
_RELATION_WEIGHT = 0.3
_RELATION_GAP = 3.0  # pixels between the centers, along the axis of the relation

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Objects:
    """The L objects in a batch of images.

    Attributes:
        image: index of the image [L].
        color: index into `COLORS` [L].
        shape: index into `SHAPES` [L].
        area: area in pixels [L].
        center: position (x, y) in pixels [L, 2].
    """

    image: Ints
    color: Ints
    shape: Ints
    area: Floats
    center: Floats


def find_objects(images: Floats) -> Objects:
    """Return the objects in images [N, 3, H, W] in 0..1: connected regions of a color.

    The filled fraction of its bounding box determines the shape of a region: 1 for a square, pi/4
    for a circle, 1/2 for a triangle. Width and height are the largest row and column sums of the
    coverage, which are exact to a fraction of a pixel.
    """
    h, w = images.shape[-2:]
    color, coverage = _segment(images)
    masks = (color[:, None] == np.arange(len(COLORS))[:, None, None]) & (coverage > 0)[:, None]
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    labels, count = ndimage.label(masks.reshape(-1, h, w), structure=in_plane)
    plane, y, x = np.nonzero(labels)
    label = labels[plane, y, x] - 1
    weight = coverage[plane // len(COLORS), y, x]

    def total(values: NDArray[np.float64] | Floats) -> NDArray[np.float64]:
        return np.bincount(label, values, minlength=count).astype(np.float64)

    def largest(line: Ints, lines: int) -> NDArray[np.float64]:
        sums = np.bincount(label * lines + line, weight, minlength=count * lines)
        size: NDArray[np.float64] = sums.reshape(count, lines).max(1, initial=0)
        return size

    area = total(weight)
    width, height = largest(y, h), largest(x, w)
    fill = area / np.maximum(width * height, 1e-6)
    plane_of = np.zeros(count, dtype=np.int64)
    plane_of[label] = plane
    center = np.stack([total(weight * x), total(weight * y)], 1) / np.maximum(area, 1e-6)[:, None]
    shape = np.where(fill > 0.89, 1, np.where(fill > 0.66, 0, 2))
    real = area >= _MIN_AREA
    return Objects(
        image=plane_of[real] // len(COLORS),
        color=plane_of[real] % len(COLORS),
        shape=shape[real].astype(np.int64),
        area=area[real].astype(np.float32),
        center=center[real].astype(np.float32),
    )


def _segment(images: Floats) -> tuple[Ints, Floats]:
    """Nearest color of each pixel [N, H, W], and how much of the pixel it covers [N, H, W]."""
    offset = images - GROUND[:, None, None]
    direction = PALETTE - GROUND
    length = np.linalg.norm(direction, axis=1)
    unit = direction / length[:, None]
    projection = np.einsum("nchw,kc->nkhw", offset, unit)  # (N, colors, H, W)
    color = projection.argmax(1)
    coverage = np.take_along_axis(projection, color[:, None], 1)[:, 0] / length[color]
    return color, np.where(coverage >= _MIN_COVERAGE, np.minimum(coverage, 1), 0)


def judge(images: Floats, prompts: Sequence[str]) -> tuple[Floats, dict[str, NDArray[np.bool_]]]:
    """Return the scores of images [N, 3, H, W] in 0..1, and the kinds of failure they show.

    A requested object that is found counts 1, or 0.4 if only its color is right. The sum is divided
    by the number of requested objects or the number of found objects, whichever is larger. If the
    prompt states a relation, the relation is 0.3 of the score.

    Returns:
        Scores [N] in 0..1, and for each kind of failure whether an image shows it [N].
    """
    n = len(images)
    found = find_objects(images)
    kinds = len(COLORS) * len(SHAPES)
    kind = found.color * len(SHAPES) + found.shape
    counts = np.bincount(found.image * kinds + kind, minlength=n * kinds)
    have = counts.reshape(n, len(COLORS), len(SHAPES))
    want = np.zeros_like(have)
    scenes = [parse(prompt) for prompt in prompts]
    for row, scene in enumerate(scenes):
        for color, shape in scene.objects:
            want[row, color, shape] += 1

    exact = np.minimum(have, want).sum((1, 2))
    colored = np.minimum(have.sum(2), want.sum(2)).sum(1)
    num_wanted, num_found = want.sum((1, 2)), have.sum((1, 2))
    total = np.maximum(num_wanted, np.maximum(num_found, 1))
    score = (exact + _COLOR_CREDIT * (colored - exact)) / total

    related = np.array([scene.relation is not None for scene in scenes], dtype=bool)
    holds = _relations_hold(found, kind, scenes, kinds)
    score = np.where(related, (1 - _RELATION_WEIGHT) * score + _RELATION_WEIGHT * holds, score)
    failures = {
        "missing": num_found < num_wanted,
        "extra": num_found > num_wanted,
        "wrong color": colored < np.minimum(num_wanted, num_found),
        "wrong shape": exact < colored,
        "wrong relation": related & ~holds,
    }
    return score.astype(np.float32), failures


def _relations_hold(
    found: Objects, kind: Ints, scenes: Sequence[Scene], kinds: int
) -> NDArray[np.bool_]:
    """Whether the relation of each scene holds [N], between the largest objects of its two kinds.

    It does not hold if one of the objects is missing.
    """
    n = len(scenes)
    position = np.full((n, kinds, 2), np.nan, dtype=np.float32)
    by_area = np.argsort(found.area, kind="stable")  # The largest object is written last and stays.
    position[found.image[by_area], kind[by_area]] = found.center[by_area]
    holds = np.zeros(n, dtype=bool)
    for row, scene in enumerate(scenes):
        if scene.relation is None:
            continue
        first, second = (
            position[row, color * len(SHAPES) + shape] for color, shape in scene.objects
        )
        step = first - second  # NaN if an object is missing. Comparisons with NaN are false.
        axis, sign = (1, 1) if scene.relation in ("above", "below") else (0, 1)
        if scene.relation in ("above", "left of"):
            sign = -1
        holds[row] = step[axis] * sign >= _RELATION_GAP
    return holds

"""The exact oracle: reads an image of the shapes world back into objects and scores it against its prompt.

It segments by colour, so no learned weakness can be exploited. Shapes: N images, L objects found in all of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flowgrain.shapes.grammar import COLOURS, SHAPES, parse
from flowgrain.shapes.render import GROUND, PALETTE

_MIN_AREA = 9.0  # pixels; a smaller spot is an artefact, not an object (the smallest drawn shape covers 32)
_MIN_COVERAGE = 0.3
_COLOUR_CREDIT = 0.4  # right colour, wrong shape
_RELATION_WEIGHT = 0.3
_RELATION_GAP = 3.0  # pixels between centres along the axis that the relation names

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Objects:
    """The L objects found in a batch: which image [L], colour [L], shape [L], area in pixels [L], centre [L, 2] as (x, y)."""

    image: Ints
    colour: Ints
    shape: Ints
    area: Floats
    centre: Floats


def find_objects(images: Floats) -> Objects:
    """Segments images [N, 3, H, W] in 0..1 by colour and names each connected region's shape.

    The share of its bounding box that a region fills tells its shape: 1 for a square, pi/4 for a circle, 1/2 for a triangle.
    Width and height are the largest row and column sums of coverage, so both are exact to a fraction of a pixel.
    """
    h, w = images.shape[-2:]
    offset = images - GROUND[:, None, None]
    direction = PALETTE - GROUND
    length = np.linalg.norm(direction, axis=1)
    projection = np.einsum("nchw,kc->nkhw", offset, direction / length[:, None])  # [N, 6, H, W]
    colour = projection.argmax(1)
    coverage = np.take_along_axis(projection, colour[:, None], 1)[:, 0] / length[colour]
    coverage = np.where(coverage >= _MIN_COVERAGE, np.minimum(coverage, 1), 0)

    masks = (colour[:, None] == np.arange(len(COLOURS))[:, None, None]) & (coverage > 0)[:, None]
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    labels, count = ndimage.label(masks.reshape(-1, h, w), structure=in_plane)
    plane, y, x = np.nonzero(labels)
    label = labels[plane, y, x] - 1
    weight = coverage[plane // len(COLOURS), y, x]

    def total(of: NDArray[np.float64] | Floats) -> NDArray[np.float64]:
        return np.bincount(label, of, minlength=count)

    area = total(weight)
    width = np.bincount(label * h + y, weight, minlength=count * h).reshape(count, h).max(1, initial=0)
    height = np.bincount(label * w + x, weight, minlength=count * w).reshape(count, w).max(1, initial=0)
    fill = area / np.maximum(width * height, 1e-6)
    home = np.zeros(count, dtype=np.int64)
    home[label] = plane
    centre = np.stack([total(weight * x), total(weight * y)], 1) / np.maximum(area, 1e-6)[:, None]
    kind = np.where(fill > 0.89, 1, np.where(fill > 0.66, 0, 2))
    real = area >= _MIN_AREA
    return Objects(
        image=home[real] // len(COLOURS),
        colour=home[real] % len(COLOURS),
        shape=kind[real].astype(np.int64),
        area=area[real].astype(np.float32),
        centre=centre[real].astype(np.float32),
    )


def judge(images: Floats, prompts: list[str]) -> tuple[Floats, dict[str, NDArray[np.bool_]]]:
    """Scores [N] in 0..1 of images [N, 3, H, W] against their prompts, and for each kind of failure which images show it.

    Objects asked for and found count 1, found in another shape 0.4; the sum is divided by the larger of the number asked
    for and the number found. Where the prompt states a relation it makes up 0.3 of the score.
    """
    n = len(images)
    found = find_objects(images)
    kinds = len(COLOURS) * len(SHAPES)
    which = found.colour * len(SHAPES) + found.shape
    have = np.bincount(found.image * kinds + which, minlength=n * kinds).reshape(n, len(COLOURS), len(SHAPES))
    want = np.zeros_like(have)
    scenes = [parse(prompt) for prompt in prompts]
    for row, scene in enumerate(scenes):
        for colour, shape in scene.objects:
            want[row, colour, shape] += 1

    exact = np.minimum(have, want).sum((1, 2))
    coloured = np.minimum(have.sum(2), want.sum(2)).sum(1)
    asked, seen = want.sum((1, 2)), have.sum((1, 2))
    score = (exact + _COLOUR_CREDIT * (coloured - exact)) / np.maximum(asked, np.maximum(seen, 1))

    related = np.array([scene.relation is not None for scene in scenes], dtype=bool)
    holds = _relations_hold(found, which, scenes, kinds)
    score = np.where(related, (1 - _RELATION_WEIGHT) * score + _RELATION_WEIGHT * holds, score)
    failures = {
        "missing": seen < asked,
        "extra": seen > asked,
        "wrong colour": coloured < np.minimum(asked, seen),
        "wrong shape": exact < coloured,
        "wrong relation": related & ~holds,
    }
    return score.astype(np.float32), failures


def _relations_hold(found: Objects, which: Ints, scenes: list, kinds: int) -> NDArray[np.bool_]:
    """Whether the two things that each scene relates are both there, the largest of each standing as it says. [N]"""
    n = len(scenes)
    place = np.full((n, kinds, 2), np.nan, dtype=np.float32)
    by_area = np.argsort(found.area, kind="stable")  # the largest is written last and stays
    place[found.image[by_area], which[by_area]] = found.centre[by_area]
    holds = np.zeros(n, dtype=bool)
    for row, scene in enumerate(scenes):
        if scene.relation is None:
            continue
        first, second = (place[row, colour * len(SHAPES) + shape] for colour, shape in scene.objects)
        step = first - second  # NaN where one is missing, and every comparison below is then false
        axis, sign = (1, 1) if scene.relation in ("above", "below") else (0, 1)
        if scene.relation in ("above", "left of"):
            sign = -1
        holds[row] = step[axis] * sign >= _RELATION_GAP
    return holds

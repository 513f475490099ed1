"""Monitors in a feature space: distance to the base images, and diversity within a prompt.

Shapes: I images, D features. The network that computes the features is the choice of the caller.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32]
"""Features [I, D] of images."""
FeatureNet = Callable[[Tensor], Features]
"""Features [I, D] of images [I, 3, H, W] in 0..1."""


def distance(a: Features, b: Features) -> NDArray[np.float64]:
    """Euclidean distance [I] of the features of two images each."""
    values: NDArray[np.float64] = np.linalg.norm(np.subtract(a, b, dtype=np.float64), axis=1)
    return values


def base_distance(features: Features, others: Features) -> float:
    """Mean distance of two images of the same prompt: the unit of distances.

    Args:
        features: [I, D] features of an image of each prompt, by the base model.
        others: [I, D] features of another image of the same prompts.

    Returns:
        NaN if the images do not differ, or if no pair of them has finite features.
    """
    found = distance(features, others)
    found = found[np.isfinite(found)]
    mean = float(found.mean()) if len(found) else 0.0
    return mean if mean > 0 else float("nan")

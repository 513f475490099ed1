"""The table of all monitors: what each measures, its unit, and which direction is worse."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "change"]
"""In which direction a value is worse. change: in both."""


@dataclass(frozen=True)
class Monitor:
    """What a monitor measures.

    Attributes:
        meaning: what the value of an image is.
        unit: unit of the value.
        worse: direction in which the value is worse.
        spread: whether changes are compared with the standard deviation of the base model's images.
            Otherwise they are compared in the unit of the monitor, because the value of the base
            model is always 0.
        least: smallest standard deviation that counts. Otherwise a monitor without any spread, such
            as dark pixels on a model of bright images, would react to a single pixel.
        rollouts: whether the value is also computed on the images of every rollout.
        watched: whether watch.monitor=all includes it. Others must be named.
    """

    meaning: str
    unit: str
    worse: Direction
    spread: bool = True
    least: float = 0.01
    rollouts: bool = True
    watched: bool = True


MONITORS: dict[str, Monitor] = {
    "edge_density": Monitor(
        "share of pixels at an edge: the gradient of the luminance is above 0.1 per pixel",
        "share of pixels",
        "change",
    ),
    "dark": Monitor("share of pixels with a luminance below 0.1", "share of pixels", "up"),
    "saturated": Monitor(
        "share of pixels whose largest and smallest channel differ by more than 0.8",
        "share of pixels",
        "up",
    ),
    "color_entropy": Monitor(
        "entropy of the histogram of colors, with 8 levels per channel",
        "bits",
        "change",
        least=0.1,
    ),
    "high_frequency": Monitor(
        "share of the luminance's variance above half of the largest frequency",
        "share of the variance",
        "up",
    ),
    # Honest runs on the bundled model changed it as much as a run that games its reward.
    "latent_norm": Monitor(
        "root mean square of the clean latent",
        "standard deviations of a latent",
        "change",
        watched=False,
    ),
    "feature_distance": Monitor(
        "distance to the image that the base model makes from the same noise",
        "mean distances of two images of a prompt by the base model",
        "up",
        spread=False,
        rollouts=False,
    ),
    "diversity": Monitor(
        "distance of two images of the prompt",
        "mean distances of two images of a prompt by the base model",
        "down",
        rollouts=False,
    ),
    "path_kl": Monitor(
        "KL to the base model, on states of the base model's sampling path",
        "KL per latent dimension of a transition",
        "up",
        spread=False,
        rollouts=False,
    ),
}
"""All monitors by name. Metrics are named monitor/NAME and eval/monitor/NAME."""

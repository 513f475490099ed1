"""Image features of the shapes world that no reward uses, to measure quality and diversity.

Shapes: I images, P prompts, D = 64 features.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import linalg
from torch import Tensor, nn

from flowgrain.shapes.grammar import COLORS, SHAPES, parse
from flowgrain.shapes.render import render

WEIGHTS = Path(__file__).parent / "weights"

Features = NDArray[np.float64]


class FeatureNet(nn.Module):
    """A network that counts the objects of each color and shape in an image.

    The layer before the counts gives the features.
    """

    def __init__(self) -> None:
        """Create the network with random weights."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
        )
        self.counts = nn.Linear(64, len(COLORS) * len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        """Return features [I, D] of images [I, 3, 32, 32] in 0..1."""
        maps: Tensor = self.body(images * 2 - 1)
        return maps.mean((2, 3))


@torch.no_grad()
def features(images: Tensor, folder: Path = WEIGHTS) -> Features:
    """Return features [I, D] of images [I, 3, 32, 32] in 0..1, from the weights in `folder`."""
    net = FeatureNet().eval()
    net.load_state_dict(load_file(folder / "features.safetensors"))
    batches = [net(batch) for batch in torch.split(images.float().cpu(), 256)]
    values: Features = torch.cat(batches).double().numpy()
    return values


def frechet(a: Features, b: Features) -> float:
    """Return the Frechet distance of two sets of features [I, D] and [J, D] (FID).

    Both sets are treated as Gaussians (Heusel et al. 2017, equation 6).
    """
    covariance = [np.cov(x, rowvar=False) for x in (a, b)]
    # The trace of the square root of a product of covariances. Its eigenvalues are real and >= 0.
    eigenvalues = linalg.eigvals(covariance[0] @ covariance[1]).real
    shared = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(covariance[0]) + np.trace(covariance[1]) - 2 * shared)


def diversity(values: Features, per_prompt: int) -> float:
    """Return the mean Euclidean distance between the features of two images of the same prompt.

    Args:
        values: features [P * per_prompt, D]. The images of a prompt are adjacent.
        per_prompt: number of images per prompt.
    """
    groups = values.reshape(-1, per_prompt, values.shape[1])
    distance = np.linalg.norm(groups[:, :, None] - groups[:, None], axis=-1)
    return float(distance.sum((1, 2)).mean() / (per_prompt * (per_prompt - 1)))


def true_features(prompts: list[str], seed: int = 0) -> Features:
    """Return features [P, D] of correct renderings of `prompts`."""
    images = render([parse(prompt) for prompt in prompts], np.random.default_rng(seed))
    return features(torch.from_numpy(images))

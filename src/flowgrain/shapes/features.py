"""Features of images of the shapes world that no reward uses, and what is measured in them: quality and diversity.

Shapes: I images, D = 64 features.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import linalg
from torch import Tensor, nn

from flowgrain.shapes.grammar import COLOURS, SHAPES, parse
from flowgrain.shapes.render import render

WEIGHTS = Path(__file__).parent / "weights"


class FeatureNet(nn.Module):
    """Counts every kind of thing (colour and shape) in an image; the layer before the counts gives the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1), nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.counts = nn.Linear(64, len(COLOURS) * len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        """Features [I, 64] of images [I, 3, 32, 32] in 0..1."""
        return self.body(images * 2 - 1).mean((2, 3))


@torch.no_grad()
def features(images: Tensor, folder: Path = WEIGHTS) -> NDArray[np.float64]:
    """Features [I, 64] of images [I, 3, 32, 32] in 0..1, by the bundled net."""
    net = FeatureNet().eval()
    net.load_state_dict(load_file(folder / "features.safetensors"))
    return torch.cat([net(part) for part in images.float().cpu().split(256)]).double().numpy()


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Frechet distance of two sets of features [I, D], [J, D], as Gaussians: 0 for equal laws (Heusel et al. 2017, eq. 6)."""
    covariance = [np.cov(x, rowvar=False) for x in (a, b)]
    # The trace of the square root of a product of two covariances: sqrt of its eigenvalues, which are real and not negative.
    shared = np.sqrt(np.clip(linalg.eigvals(covariance[0] @ covariance[1]).real, 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance[0]) + np.trace(covariance[1]) - 2 * shared)


def diversity(found: NDArray[np.float64], per_prompt: int) -> float:
    """Mean Euclidean distance between the features of two images of one prompt; [P * per_prompt, D], a prompt's images together."""
    groups = found.reshape(-1, per_prompt, found.shape[1])
    distance = np.linalg.norm(groups[:, :, None] - groups[:, None], axis=-1)
    return float(distance.sum((1, 2)).mean() / (per_prompt * (per_prompt - 1)))


def true_features(prompts: list[str], seed: int = 0) -> NDArray[np.float64]:
    """Features [I, 64] of true renderings of `prompts`."""
    return features(torch.from_numpy(render([parse(p) for p in prompts], np.random.default_rng(seed))))

"""Trees and rollouts of given images, which no policy has sampled.

Shapes: I images, N rows, *L latent.
"""

import numpy as np
from torch import Tensor

from flowgrain.core.rollout import Rollout
from flowgrain.core.tree import ROOT, Tree


def image_tree(num_steps: int, images: int) -> Tree:
    """The tree of one prompt with `images` given images. Every row is a root and a leaf.

    Args:
        num_steps: T, steps of the sampling grid.
        images: number of images of a prompt.
    """
    rows, no = np.arange(images), np.zeros(images, dtype=bool)
    return Tree(
        num_steps=num_steps,
        num_prompts=1,
        parent=np.full(images, ROOT),
        grid_index=np.full(images, num_steps),
        stochastic=no,
        trained=no,
        multistep=no,
        kept=no,
        prompt=np.zeros(images, dtype=np.int64),
        draw=rows,
        image=rows,
        channel=np.zeros(images, dtype=np.int64),
    )


def given_rollout(tree: Tree, latents: Tensor) -> Rollout:
    """The rollout of a tree of given images, without forward passes.

    Args:
        tree: `image_tree`, repeated for all prompts.
        latents: [N, *L] latents of the images.
    """
    return Rollout(tree, latents, np.arange(len(tree)), forward_passes=0, batches=0)

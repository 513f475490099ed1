"""The gradient of a reward against finite differences, and its scores against those of a call."""

import torch

from flowgrain.rewards import gradient, score


def check_gradient(reward, images, prompts, tolerance=0.02):
    """The slope along the gradient of each image is the norm of the gradient."""
    scores, slopes = gradient(reward, images, prompts)
    plain = score(reward, images, prompts).values
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(reward, images, prompts, batch_size=1)[1], slopes)
    norm = slopes.flatten(1).norm(dim=1)
    assert norm.min() > 0
    direction = slopes / norm[:, None, None, None]
    step = 0.02
    up, down = (score(reward, images + s * direction, prompts).values for s in (step, -step))
    torch.testing.assert_close((up - down) / (2 * step), norm, rtol=tolerance, atol=0)

"""The update of a method that trains on finished images by noising them again (DiffusionNFT), beside the one of train.py.

Letters: I images, B rows of a micro-batch, *L latent.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowgrain.backbones import take
from flowgrain.objective import ForwardProcess
from flowgrain.policy import Policy
from flowgrain.prompts import latent_noise
from flowgrain.sampled import Metrics, Sampled
from flowgrain.sde import per_row
from flowgrain.settings import Settings

Optimise = Callable[[list[Tensor]], tuple[Tensor, bool]]
"""optimise(losses) takes the optimizer step of the gradients at hand; the gradient's norm, and whether it was skipped."""


def contrast(s: Settings, policy: Policy, sigmas: Tensor, sampled: Sampled, process: ForwardProcess, optimise: Optimise) -> Metrics:
    """The optimizer steps of one rollout: every image at `process.times` levels of the grid `sigmas` [T + 1], drawn for each."""
    tree = sampled.result.tree
    leaves = tree.leaves
    random = np.random.default_rng([s.seed, sampled.step])
    levels = random.permuted(np.tile(np.arange(s.num_steps), (len(leaves), 1)), axis=1)[:, : process.times]  # (I, times)
    prompts = np.unique(tree.prompt)
    images_of_update = [
        np.flatnonzero(np.isin(tree.prompt[leaves], part))
        for part in np.array_split(prompts, int(s.updates_per_rollout))
        if len(part)
    ]
    size = s.train_rows_per_pass or s.rows_per_pass
    losses, distances, norms, skipped, rows = [], [], [], 0, 0
    for images in images_of_update:
        image, level = images.repeat(process.times), levels[images].ravel()
        done = []
        for first in range(0, len(image), size):
            i, k = image[first : first + size], level[first : first + size]
            x0 = sampled.result.at(leaves[i]).float()  # (B, *L)
            keys = zip(i.tolist(), k.tolist(), strict=True)
            eps = torch.stack([latent_noise(x0.shape[1:], "forward", s.seed, sampled.step, *key) for key in keys]).to(x0)
            sigma = sigmas[torch.from_numpy(k).to(policy.device)]
            x = (1 - per_row(sigma, x0)) * x0 + per_row(sigma, x0) * eps
            cond = take(sampled.cond, torch.from_numpy(tree.prompt[leaves[i]]).to(policy.device))
            at = (x, sigma, cond, s.guidance_scale)
            v = policy.train_velocity(*at)
            advantage = sampled.advantage[torch.from_numpy(i)].to(policy.device)
            loss = process.loss(v, policy.old_velocity(*at), eps - x0, sigma, advantage)
            if s.kl_weight:
                distance = (v - policy.reference_velocity(*at)).square().flatten(1).mean(1)
                loss = loss + s.kl_weight * distance
                distances.append(distance.detach())
            (loss.sum() / len(image)).backward()
            done.append(loss.detach())
        rows += len(image)
        losses += done
        norm, was_skipped = optimise(done)
        norms.append(norm)
        skipped += was_skipped
    policy.drag_old(process.decay(sampled.step))
    metrics: Metrics = {
        "loss": float(torch.cat(losses).mean()),
        "grad_norm": float(torch.stack(norms).mean()),
        "updates": len(images_of_update),
        "updates/skipped": skipped,
        "train_forward_passes": rows,
        "frozen_forward_passes": rows * (2 if s.kl_weight else 1),
    }
    if s.kl_weight:
        metrics["kl"] = float(torch.cat(distances).mean())
    return metrics

"""The update of a method that trains on finished images by noising them again (DiffusionNFT), beside the one of train.py.

Letters: I images, B rows of a micro-batch, *L latent.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from flowgrain.models import take
from flowgrain.core.objective import ForwardProcess
from flowgrain.distributed.mesh import reduce_gradients_now
from flowgrain.training.policy import Policy
from flowgrain.data import latent_noise
from flowgrain.training.rollout_batch import Metrics, Sampled
from flowgrain.core.sde import per_row
from flowgrain.config.schema import Settings

Optimise = Callable[[list[Tensor]], tuple[Tensor, bool]]
"""optimise(losses) takes the optimizer step of the gradients at hand; the gradient's norm, and whether it was skipped."""


MeanOfAll = Callable[[Mapping[str, list[Tensor]]], dict[str, float]]
"""The mean of each name's values over all processes."""


def contrast(
    s: Settings,
    policy: Policy,
    sigmas: Tensor,
    sampled: Sampled,
    process: ForwardProcess,
    optimise: Optimise,
    mean_of_all: MeanOfAll,
) -> Metrics:
    """The optimizer steps of one rollout: every image at `process.times` levels of the grid `sigmas` [T + 1], drawn for each."""
    leaves = sampled.whole.leaves
    random = np.random.default_rng([s.seed, sampled.step])
    levels = random.permuted(np.tile(np.arange(s.num_steps), (len(leaves), 1)), axis=1)[:, : process.times]  # (I, times)
    of_prompt = sampled.whole.prompt[leaves]
    shares = [
        leaves[np.isin(of_prompt, part)] for part in np.array_split(np.unique(of_prompt), int(s.updates_per_rollout)) if len(part)
    ]
    size = s.train_rows_per_pass or s.rows_per_pass
    losses, distances, norms, skipped = [], [], [], 0
    for share in shares:
        done = []
        # A row a level of an image: sizes are counted in those.
        passes = sampled.passes(share.repeat(process.times), size)
        taken = 0
        for place, (rows, counts) in enumerate(passes):
            reduce_gradients_now(policy.transformer, place == len(passes) - 1)
            image = np.searchsorted(leaves, sampled.there(rows)).clip(max=len(leaves) - 1)  # among all images
            k = levels[image, np.arange(taken, taken + len(rows)) % process.times]
            taken += len(rows)
            x0 = sampled.result.at(rows).float()  # (B, *L)
            keys = zip(image.tolist(), k.tolist(), strict=True)
            eps = torch.stack([latent_noise(x0.shape[1:], "forward", s.seed, sampled.step, *key) for key in keys]).to(x0)
            sigma = sigmas[torch.from_numpy(k).to(policy.device)]
            x = (1 - per_row(sigma, x0)) * x0 + per_row(sigma, x0) * eps
            cond = take(sampled.cond, torch.from_numpy(sampled.result.tree.prompt[rows]).to(policy.device))
            at = (x, sigma, cond, s.guidance_scale)
            v = policy.train_velocity(*at)
            advantage = sampled.advantage[torch.from_numpy(image)].to(policy.device)
            loss = process.loss(v, policy.old_velocity(*at), eps - x0, sigma, advantage)
            if s.kl_weight:
                distance = (v - policy.reference_velocity(*at)).square().flatten(1).mean(1)
                loss = loss + s.kl_weight * distance
                distances += [distance.detach()] if counts else []
            (loss.sum() * counts / (len(share) * process.times)).backward()
            done += [loss.detach()] if counts else []
        losses += done
        norm, was_skipped = optimise(done)
        norms.append(norm)
        skipped += was_skipped
    policy.drag_old(process.decay(sampled.step))
    rows_in_all = len(leaves) * process.times
    metrics: Metrics = {
        "loss": mean_of_all({"loss": losses})["loss"],
        "grad_norm": float(torch.stack(norms).mean()),
        "updates": len(shares),
        "updates/skipped": skipped,
        "train_forward_passes": rows_in_all,
        "frozen_forward_passes": rows_in_all * (2 if s.kl_weight else 1),
    }
    if s.kl_weight:
        metrics["kl"] = mean_of_all({"kl": distances})["kl"]
    return metrics

"""Samples of the policy for monitors: second images of prompts, and velocities on base paths.

Shapes: I images of an evaluation, P prompts with a sampling path, K states of a path, *L latent.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.tree import Ints
from flowgrain.data import latent_noise
from flowgrain.models import Conditioning, take
from flowgrain.monitors.features import FeatureNet, Features
from flowgrain.monitors.path import chosen_steps, path_kl
from flowgrain.training.evaluate import (
    Column,
    Evaluation,
    evaluation_noise,
    interleave_rows,
    sample,
)
from flowgrain.training.policy import Policy
from flowgrain.training.signals import check_stop

PAIRS = 16
"""Prompts with a second image, for the diversity."""
PATHS = 8
"""Prompts with a sampling path, for the KL."""


@dataclass(frozen=True)
class Probe:
    """Samples for an evaluation of all ranks. All ranks must call its methods together.

    Every rank samples its share of the prompts, and gets the results of all prompts. The caller
    chooses the parameters with `Policy.averaged`.

    Args:
        config: settings of the run.
        policy: the policy that samples.
        evaluation: gives the prompts and the number of sampling steps.
    """

    config: Config
    policy: Policy
    evaluation: Evaluation

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [T + 1] of the evaluation."""
        return self.config.sigmas(self.evaluation.num_steps).to(self.policy.device)

    def features_of_others(self, net: FeatureNet) -> Features:
        """Features [n, D] of a second image of each of the first `PAIRS` prompts."""
        count, places = self._places(PAIRS)
        shape = self.policy.backbone.latent_shape
        noise = torch.stack([latent_noise(shape, "diversity", 0, int(i)) for i in places])
        texts = [self.evaluation.prompts[i].text for i in places]
        size, guidance = self.config.sampling.batch_size, self.config.eval_guidance
        images = sample(self.policy, texts, noise, self.sigmas, guidance, size).images
        return self._gathered(net(images), count)

    def states(self) -> Features:
        """States [P, K, *L] on the ODE paths of the first `PATHS` images."""
        count, places = self._places(PATHS)
        x = evaluation_noise(self.policy.backbone.latent_shape, 0, places.tolist())
        x, cond = x.to(self.policy.device), self._encode(places)
        sigmas, chosen, states = self.sigmas, chosen_steps(self.evaluation.num_steps), []
        for index in range(chosen[-1] + 1):
            if index in chosen:
                states.append(x.cpu())
            x = x + (sigmas[index + 1] - sigmas[index]) * self._velocity(x, sigmas[index], cond)
        return self._gathered(torch.stack(states, 1).numpy(), count)

    def velocities(self, x: Features) -> Features:
        """Velocities [P, K, *L] of the policy at the states `x` [P, K, *L]."""
        count, places = self._places(len(x))
        cond, found = self._encode(places), []
        for number, index in enumerate(chosen_steps(self.evaluation.num_steps)):
            states = torch.from_numpy(x[places, number]).to(self.policy.device)
            found.append(self._velocity(states, self.sigmas[index], cond).cpu())
        return self._gathered(torch.stack(found, 1).numpy(), count)

    def path_kl(self, x: Features, base: Features) -> dict[str, Column]:
        """The monitor path_kl [I], NaN for images without a path.

        Empty if the paths belong to another number of steps or prompts.

        Args:
            x: [P, K, *L] states of the base model.
            base: [P, K, *L] its velocities.
        """
        steps, count = self.evaluation.num_steps, len(self.evaluation.prompts)
        if x.shape[1] != len(chosen_steps(steps)) or len(x) > count:
            return {}
        states, v, v_base = (torch.from_numpy(a) for a in (x, self.velocities(x), base))
        return {"path_kl": padded(path_kl(states, v, v_base, self.config.sigmas(steps)), count)}

    def _places(self, most: int) -> tuple[int, Ints]:
        """Number of the first prompts, at most `most`, and the places of this rank among them."""
        count = min(most, len(self.evaluation.prompts))
        return count, self.policy.world.assign(count) % count

    def _gathered(self, of_rank: Features, count: int) -> Features:
        return interleave_rows(self.policy.world.gather_data(of_rank), count)

    def _encode(self, places: Ints) -> Conditioning:
        return self.policy.encode([self.evaluation.prompts[i].text for i in places])

    def _velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v [B, *L] at noise level `sigma`, in float32."""
        guidance, found = self.config.eval_guidance, []
        for rows in torch.split(torch.arange(len(x)), self.config.sampling.batch_size):
            check_stop(self.policy.world)
            part, level = take(cond, rows.to(x.device)), sigma.repeat(len(rows))
            v = self.policy.sample_velocity(x[rows.to(x.device)], level, part, guidance)
            found.append(v.float())
        return torch.cat(found)


def padded(values: Tensor | NDArray[np.floating], count: int) -> Column:
    """`values` of the first images as a column [count]. NaN for the other images."""
    column = np.full(count, np.nan, dtype=np.float32)
    column[: len(values)] = np.asarray(values)
    return column

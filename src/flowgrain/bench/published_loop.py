"""A training step as published code runs it: row by row, without shared states.

Sampling makes one forward pass with one row for every step of every branch. A step that several
granularities share is computed once, while published code computes it for each of them. Images are
decoded and scored one at a time. The update makes one forward pass with gradient, with one row, for
every state before a trained step.

Shapes: *L latent, E trained edges below a state.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.credit import combine
from flowgrain.core.objective import Edges
from flowgrain.core.sde import ODE, Gaussian, Kernel, Step
from flowgrain.core.tree import ROOT, Ints, Tree
from flowgrain.data import Prompt
from flowgrain.methods import PolicyGradient
from flowgrain.models import take
from flowgrain.rewards import GroupReward, Reward
from flowgrain.training import Trainer
from flowgrain.training.timer import StageTimer

STAGES = ("sample", "decode", "score", "update")


@dataclass
class PublishedLoop:
    """The loop on the policy, the rewards and the method of a run.

    Attributes:
        trainer: a run of a policy-gradient method.
    """

    trainer: Trainer

    def __post_init__(self) -> None:
        trainer = self.trainer
        assert isinstance(trainer.method, PolicyGradient)
        self.method: PolicyGradient = trainer.method
        self.prompts = trainer.prompts[: trainer.config.training.prompts_per_step]
        self.tree: Tree = trainer.config.tree().repeat(len(self.prompts))
        self.cond = trainer.policy.encode([prompt.text for prompt in self.prompts])
        self.guidance = trainer.config.sampling.guidance_scale

    @property
    def forward_passes(self) -> int:
        """Forward passes with one row of `sample`: one per step of a branch."""
        return int((self.tree.parent != ROOT).sum())

    def step(self) -> dict[str, float]:
        """Run a training step. Returns the seconds of its stages."""
        timer = StageTimer(self.trainer.device)
        with timer.measure("sample"):
            latents = self.sample()
        with timer.measure("decode"):
            images = self.decode(latents)
        with timer.measure("score"):
            advantage = self.score(images)
        with timer.measure("update"):
            self.update(latents, advantage)
        return {stage: timer.seconds[f"seconds/{stage}"] for stage in STAGES}

    @torch.no_grad()
    def sample(self) -> list[Tensor]:
        """The latent [1, *L] of every row of the tree, each from its own forward pass."""
        trainer, tree, latents = self.trainer, self.tree, list[Tensor]()
        kernel, shape = trainer.collector.kernel(), trainer.backbone.latent_shape
        for row, parent in enumerate(tree.parent):
            if parent == ROOT:
                latents.append(torch.randn(1, *shape, device=trainer.device))
                continue
            x, sigma = latents[parent], trainer.sigmas[[int(tree.grid_index[parent])]]
            v = trainer.policy.sample_velocity(x, sigma, self._cond(row), self.guidance)
            transition = self._transition(kernel if tree.stochastic[row] else ODE(), x, v, row)
            latents.append(transition.sample(torch.randn_like(x, dtype=torch.float32)))
        return latents

    @torch.no_grad()
    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """Images [1, 3, H, W] on the CPU, one at a time."""
        decode = self.trainer.backbone.decode
        return [decode(latents[leaf]).cpu() for leaf in self.tree.leaves]

    def score(self, images: list[Tensor]) -> Tensor:
        """Advantages of all trained edges, with rewards that score one image at a time."""
        trainer, method = self.trainer, self.method
        owners = [self.prompts[number] for number in self.tree.prompt[self.tree.leaves]]
        values = {
            name: torch.tensor(
                [
                    float(torch.as_tensor(self._scored(reward, image, owner))[0])
                    for image, owner in zip(images, owners, strict=True)
                ]
            )
            for name, reward in trainer.rewards.items()
        }
        return combine(
            method.credit,
            self.tree,
            values,
            trainer.collector.reward_weights,
            method.normalization(),
            method.reward_mix,
            method.advantage_clip,
        )

    def update(self, latents: list[Tensor], advantage: Tensor) -> None:
        """One optimizer update with a forward pass per state before a trained step."""
        trainer, tree, losses = self.trainer, self.tree, list[Tensor]()
        policy, kernel = trainer.policy, self.method.kernel(trainer.sigmas)
        objective = self.method.objective(trainer.sigmas)
        for parent in tree.trained_parents:
            children = tree.edges[tree.parent[tree.edges] == parent]
            x, cond = latents[parent].float(), self._cond(parent)
            sigma = trainer.sigmas[[int(tree.grid_index[parent])]]
            v = policy.train_velocity(x, sigma, cond, self.guidance)
            transition, step = self._fan(kernel, x, v, children)
            reference = None
            if self.method.kl_weight:
                free = policy.reference_velocity(x, sigma, cond, self.guidance)
                reference = self._fan(kernel, x, free, children)[0]
            old = Gaussian(transition.mean.detach(), transition.std, transition.squared_error)
            x_next = torch.cat([latents[child] for child in children])  # (E, *L)
            place = torch.from_numpy(np.searchsorted(tree.edges, children))
            gain = advantage[place].to(trainer.device)
            result = objective(Edges(transition, old, x_next, gain, step, reference))
            loss = result.loss.sum() / len(tree.edges)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        trainer.optimizer.step(losses)

    @staticmethod
    def _scored(reward: Reward, image: Tensor, owner: Prompt) -> Any:
        """The score [1] of one image.

        Raises:
            TypeError: the reward compares images.
        """
        if isinstance(reward, GroupReward):
            raise TypeError("the loop scores one image at a time, but the reward compares images")
        return reward(image, [owner])

    def _cond(self, row: int) -> dict[str, Tensor]:
        prompt = torch.tensor([int(self.tree.prompt[row])], device=self.trainer.device)
        return take(self.cond, prompt)

    def _transition(self, kernel: Kernel, x: Tensor, v: Tensor, row: int) -> Gaussian:
        return self._fan(kernel, x, v, np.array([row]))[0]

    def _fan(self, kernel: Kernel, x: Tensor, v: Tensor, children: Ints) -> tuple[Gaussian, Step]:
        """Transitions from a state x [1, *L] to its `children` [E], and their grid steps."""
        tree, device = self.tree, self.trainer.device
        start = torch.from_numpy(tree.grid_index[tree.parent[children]]).to(device)
        end = torch.from_numpy(tree.grid_index[children]).to(device)
        step = Step.on(self.trainer.sigmas, start, end)
        rows = (len(children), *x.shape[1:])
        return kernel(x.expand(rows), v.expand(rows), step), step

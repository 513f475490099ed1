"""A G2RPO step of one prompt as in published code: row by row, without shared states."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrain.core.sde import ODE, FlowSDE, Gaussian, Kernel, Step
from flowgrain.core.tree import coarse_indices
from flowgrain.methods.g2rpo import G2RPO
from flowgrain.models import take
from flowgrain.training import Trainer


@dataclass
class Fan:
    """The branches of a stochastic step.

    Attributes:
        index: grid index of the step.
        x: [1, *L] state before it.
        x_next: G states [1, *L] after it.
        finished: for each branch its finished latents [1, *L], by granularity.
    """

    index: int
    x: Tensor
    x_next: list[Tensor]
    finished: list[list[Tensor]]


class PublishedLoop:
    """The training step as a loop over branches.

    Args:
        trainer: a G2RPO run, whose model and rewards are used.
        prompt: number of the prompt.
        branches: branches of every stochastic step. Fewer than the group size measure the speed.
    """

    def __init__(self, trainer: Trainer, prompt: int = 0, branches: int | None = None) -> None:
        assert isinstance(trainer.method, G2RPO)
        self.trainer, self.method = trainer, trainer.method
        self.prompt = trainer.prompts[prompt]
        self.branches = branches or self.method.group_size
        first = torch.tensor([0], device=trainer.device)
        self.cond = take(trainer.policy.encode([self.prompt.text]), first)

    def _transition(self, x: Tensor, v: Tensor, start: int, end: int, kernel: Kernel) -> Gaussian:
        step = Step.on(self.trainer.sigmas, torch.tensor([start]), torch.tensor([end]))
        return kernel(x, v, step)

    def _walk(self, x: Tensor, start: int, end: int, kernel: Kernel) -> Tensor:
        trainer, guidance = self.trainer, self.trainer.config.sampling.guidance_scale
        v = trainer.policy.sample_velocity(x, trainer.sigmas[[start]], self.cond, guidance)
        return self._transition(x, v, start, end, kernel).sample(torch.randn_like(x))

    @torch.no_grad()
    def sample(self) -> list[Fan]:
        """One ODE trajectory, and branches from the first half of its states, per granularity."""
        num_steps, fans = self.trainer.config.sampling.num_steps, []
        shape, device = self.trainer.backbone.latent_shape, self.trainer.device
        x = torch.randn(1, *shape, device=device)
        for k in range(num_steps):
            if k < num_steps // 2:
                fan = Fan(k, x, [], [])
                for _ in range(self.branches):
                    fan.x_next.append(self._walk(x, k, k + 1, FlowSDE(self.method.eta)))
                    fan.finished.append([])
                    for stride in self.method.granularities:
                        y = fan.x_next[-1]
                        indices = coarse_indices(k + 1, num_steps, stride)
                        for start, end in itertools.pairwise(indices):
                            y = self._walk(y, start, end, ODE())
                        fan.finished[-1].append(y)
                fans.append(fan)
            x = self._walk(x, k, k + 1, ODE())
        return fans

    def decode(self, fans: list[Fan]) -> list[Tensor]:
        """Images [1, 3, H, W], one at a time."""
        latents = (x for fan in fans for branch in fan.finished for x in branch)
        return [self.trainer.backbone.decode(x).cpu() for x in latents]

    def score(self, fans: list[Fan], images: list[Tensor]) -> Tensor:
        """Advantages [K, G] of the first reward, which scores one image at a time."""
        reward = next(iter(self.trainer.rewards.values()))
        scores = torch.tensor([float(reward(image, [self.prompt])[0]) for image in images])
        scores = scores.reshape(len(fans), self.branches, -1)
        std = scores.std(1, keepdim=True) if self.branches > 1 else torch.ones(1)
        return ((scores - scores.mean(1, keepdim=True)) / (std + 1e-8)).sum(-1).clamp(-5, 5)

    def update(self, fans: list[Fan], advantages: Tensor) -> None:
        """One optimizer update, with a gradient forward pass per stochastic step."""
        trainer, losses = self.trainer, []
        guidance, clip = trainer.config.sampling.guidance_scale, self.method.clip_range
        for fan, advantage in zip(fans, advantages, strict=True):
            x, k = fan.x.float(), fan.index
            v = trainer.policy.train_velocity(x, trainer.sigmas[[k]], self.cond, guidance)
            transition = self._transition(x, v, k, k + 1, FlowSDE(self.method.eta))
            log_prob = torch.stack([transition.log_prob(y.float()) for y in fan.x_next])[:, 0]
            ratio = (log_prob - log_prob.detach()).exp()
            gain = advantage.to(ratio)
            clipped = -gain * ratio.clamp(1 - clip, 1 + clip)
            losses.append(torch.maximum(-gain * ratio, clipped).mean() / len(fans))
            losses[-1].backward()
        trainer.optimizer.step([loss.detach()[None] for loss in losses])

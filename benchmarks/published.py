"""A G2RPO iteration of one prompt as published code writes it: row by row, nothing shared, nothing batched."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrain.models import take
from flowgrain.core.sde import ODE, FlowSDE, Kernel, Step
from flowgrain.training.trainer import Run
from flowgrain.core.tree import coarse_levels


@dataclass
class Branched:
    """One noise step: where it began, x [1, *L]; the branches' next states [G, *L]; the finished latents [G, Lambda, *L]."""

    step: int
    x: Tensor
    following: list[Tensor]
    finished: list[list[Tensor]]


class Published:
    """The iteration of prompt number `place` of the run's prompts; `branches` a step, or fewer for a fair sample of its speed."""

    def __init__(self, run: Run, place: int = 0, branches: int | None = None) -> None:
        self.run, self.prompt = run, run.prompts[place]
        self.branches = branches or run.settings.group_size
        self.cond = take(run.policy.encode([self.prompt]), torch.tensor([0], device=run.device))

    def _go(self, x: Tensor, start: int, end: int, kernel: Kernel) -> Tensor:
        run = self.run
        v = run.policy.sample_velocity(x, run.sigmas[[start]], self.cond, run.settings.guidance_scale)
        law = kernel(x, v, Step.on(run.sigmas, torch.tensor([start]), torch.tensor([end])))
        return law.sample(torch.randn_like(x))

    @torch.no_grad()
    def sample(self) -> list[Branched]:
        """An anchor, and from each of its first T/2 states `branches` branches, each finished at every granularity."""
        s, found = self.run.settings, []
        x = torch.randn(1, *self.run.backbone.latent_shape, device=self.run.device)
        for k in range(s.num_steps):
            if k < s.num_steps // 2:
                here = Branched(k, x, [], [])
                for _ in range(self.branches):
                    here.following.append(self._go(x, k, k + 1, FlowSDE(s.eta)))
                    here.finished.append([])
                    for stride in s.granularities:
                        y = here.following[-1]
                        for start, end in itertools.pairwise(coarse_levels(k + 1, s.num_steps, stride)):
                            y = self._go(y, start, end, ODE())
                        here.finished[-1].append(y)
                found.append(here)
            x = self._go(x, k, k + 1, ODE())
        return found

    def decode(self, found: list[Branched]) -> list[Tensor]:
        """Images [1, 3, H, W], one at a time."""
        return [self.run.backbone.decode(x).cpu() for one in found for of_branch in one.finished for x in of_branch]

    def score(self, found: list[Branched], images: list[Tensor]) -> Tensor:
        """Advantages [K, G] of the first reward, asked image by image: a sum over granularities."""
        reward = next(iter(self.run.rewards.values()))
        values = torch.tensor([float(reward(image, [self.prompt])[0]) for image in images])
        values = values.reshape(len(found), self.branches, -1)
        spread = values.std(1, keepdim=True) if self.branches > 1 else torch.ones(1)
        return ((values - values.mean(1, keepdim=True)) / (spread + 1e-8)).sum(-1).clamp(-5, 5)

    def update(self, found: list[Branched], advantage: Tensor) -> None:
        """One optimizer step; a gradient forward for each noise step."""
        run, s = self.run, self.run.settings
        losses = []
        for one, of_step in zip(found, advantage, strict=True):
            v = run.policy.train_velocity(one.x.float(), run.sigmas[[one.step]], self.cond, s.guidance_scale)
            start, end = torch.tensor([one.step]), torch.tensor([one.step + 1])
            law = FlowSDE(s.eta)(one.x.float(), v, Step.on(run.sigmas, start, end))
            log_prob = torch.stack([law.log_prob(y.float()) for y in one.following])[:, 0]
            ratio = (log_prob - log_prob.detach()).exp()
            of_step = of_step.to(ratio)
            surrogate = torch.maximum(-of_step * ratio, -of_step * ratio.clamp(1 - s.clip_range, 1 + s.clip_range))
            losses.append(surrogate.mean() / len(found))
            losses[-1].backward()
        run.optimise([loss.detach()[None] for loss in losses])

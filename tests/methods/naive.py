"""A naive trainer, written from the formulas of the papers.

It computes one row at a time, shares nothing, and uses the same noise. It does not use the core,
the behavior of the methods or the training code.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from toy import PROMPTS
from toy_trainer import REWARDS, SEED, STEP, P

from flowgrain.data import Prompt, latent_noise
from flowgrain.training import Trainer

Values = dict[str, list[float]]
"""By reward: one value per channel."""


@dataclass(eq=False)
class NaiveEdge:
    """A trained step: from x at grid index k to x_next."""

    prompt: int
    k: int
    x: Tensor
    x_next: Tensor
    log_prob: float
    values: Values
    advantage: float = 0.0
    end: int = 0
    """Grid index of x_next."""


class Naive:
    """Sampling, credit and loss. Noise is numbered per prompt in the order of its use."""

    def __init__(self, trainer: Trainer) -> None:
        self.config, self.method = trainer.config, trainer.config.method
        self.num_steps, self.group_size = self.config.sampling.num_steps, self.method.group_size
        self.model, self.toy = trainer.policy.model, trainer.backbone
        order = np.random.default_rng([SEED, 0]).permutation(len(trainer.prompts))
        self.texts = [trainer.prompts[i].text for i in order[:P]]
        t, shift = np.linspace(1, 0, self.num_steps + 1), self.config.sampling.shift or 3
        self.sigma = [float(np.float32(s)) for s in shift * t / (1 + (shift - 1) * t)]
        self.edges: list[NaiveEdge] = []
        self.images: list[Tensor] = []

    def begin(self, prompt: int) -> None:
        """Start with another prompt."""
        self.prompt, self.draws = prompt, 0

    # ------------------------------------------------------------------ sampling

    def noise(self) -> Tensor:
        """The next noise sample of the prompt."""
        self.draws += 1
        return latent_noise((2, 3), "train", SEED, STEP, self.prompt, self.draws - 1)

    def v(self, x: Tensor, k: int, prompt: int | None = None) -> Tensor:
        """Velocity of the trained policy at grid index k."""
        text = self.texts[self.prompt if prompt is None else prompt]
        number = torch.tensor([PROMPTS.index(text)])
        return self.model(x[None], torch.tensor([self.sigma[k]]), number)[0]

    def transition(
        self, x: Tensor, v: Tensor, k: int, end: int | None = None
    ) -> tuple[Tensor, float]:
        """Mean and std of a stochastic step from grid index k to `end`, by default k + 1."""
        method, s, s_next = self.method, self.sigma[k], self.sigma[end or k + 1]
        dt = s_next - s
        if method.sde_type == "dance_sde":
            score = -(x - (1 - s) * (x - s * v)) / s**2
            mean = x + v * dt - method.eta**2 / 2 * score * dt
            return mean, method.eta * math.sqrt(-dt)
        if method.sde_type == "cps":
            std = s_next * math.sin(method.eta * math.pi / 2)
            kept = math.sqrt(s_next * s_next - std * std)
            return (1 - s_next) * (x - s * v) + kept * (x + (1 - s) * v), std
        if method.sde_type == "calibrated_sde":
            strength = method.psi[k]
        else:
            level = s_next if k == 0 else s
            strength = method.eta * math.sqrt(s / (1 - level))
        drift = strength**2 / (2 * s)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - s)) * dt
        return mean, strength * math.sqrt(-dt)

    def log_prob(self, x: Tensor, mean: Tensor, std: float) -> Tensor:
        """log N(x; mean, std^2), or the negative squared error: mean over dimensions."""
        if getattr(self.method, "cps_log_prob", "gaussian") == "squared_error":
            return -((x - mean) ** 2).mean()
        z = (x - mean) ** 2 / (2 * std**2)
        return (-z - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()

    def sde(self, x: Tensor, k: int, end: int | None = None) -> tuple[Tensor, float]:
        """A stochastic step from grid index k: the next state and its log-probability."""
        with torch.no_grad():
            mean, std = self.transition(x, self.v(x, k), k, end)
            x_next = mean + std * self.noise()
            return x_next, float(self.log_prob(x_next, mean, std))

    def ode(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """Euler steps along grid `indices`."""
        with torch.no_grad():
            for k, j in itertools.pairwise(indices):
                x = x + self.v(x, k) * (self.sigma[j] - self.sigma[k])
        return x

    def solver(
        self, x: Tensor, indices: Sequence[int], x0_before: Tensor | None, before: int
    ) -> Tensor:
        """DPM-Solver++(2M) in the terms of its paper, with alpha = 1 - sigma.

        The step into sigma = 0 gives the x0 estimate.
        """
        with torch.no_grad():
            for c, n in itertools.pairwise(indices):
                s_c, s_n = self.sigma[c], self.sigma[n]
                x0 = x - s_c * self.v(x, c)
                if s_n == 0:
                    return x0
                h, h_before = (self.log_snr(b) - self.log_snr(a) for a, b in ((c, n), (before, c)))
                estimate = x0
                if x0_before is not None:
                    estimate = x0 + (h / h_before) / 2 * (x0 - x0_before)
                x = s_n / s_c * x - (1 - s_n) * math.expm1(-h) * estimate
                x0_before, before = x0, c
        return x

    def log_snr(self, k: int) -> float:
        """log(alpha / sigma) at grid index k."""
        s = self.sigma[k]
        return math.log((1 - s) / s) if s < 1 else -math.inf

    def x0_hat(self, x: Tensor, k: int) -> Tensor:
        """The x0 estimate at grid index k."""
        with torch.no_grad():
            return x - self.sigma[k] * self.v(x, k)

    def steps(
        self, x: Tensor, indices: Sequence[int], x0_before: Tensor | None, before: int
    ) -> Tensor:
        """Deterministic steps along grid `indices`, of the order that the method sets."""
        if self.method.tail_order == 2:
            return self.solver(x, indices, x0_before, before)
        return self.ode(x, indices)

    def finish(self, x: Tensor, start: int, x0_before: Tensor | None) -> Tensor:
        """The ODE tail from grid index `start`, which a stochastic step reached, to sigma = 0."""
        remaining = self.num_steps - start
        count = max(1, int(remaining * self.method.tail_ratio))
        indices = [start, *(round(start + remaining * j / count) for j in range(1, count + 1))]
        return self.steps(x, indices, x0_before, start - 1)

    # ------------------------------------------------------------------ edges

    def score(self, x: Tensor) -> dict[str, float]:
        """The rewards of a finished latent, which is recorded as an image."""
        self.images.append(x)
        image, prompt = self.toy.decode(x[None]), Prompt(self.texts[self.prompt])
        return {name: float(reward(image, [prompt])[0]) for name, reward in REWARDS.items()}

    def edge(
        self,
        k: int,
        x: Tensor,
        x_next: Tensor,
        log_prob: float,
        values: Values,
        end: int | None = None,
    ) -> None:
        """Add a trained step."""
        edge = NaiveEdge(self.prompt, k, x, x_next, log_prob, values, end=end or k + 1)
        self.edges.append(edge)

    def trajectory(self, x: Tensor, stochastic: Sequence[int], trained: Sequence[int]) -> None:
        """A trajectory from sigma = 1 to 0. All its trained steps have its reward."""
        steps, last = [], max(stochastic)
        for k in range(last + 1):
            x0_hat = self.x0_hat(x, k)
            if k in stochastic:
                x_next, log_prob = self.sde(x, k)
                if k in trained:
                    steps.append((k, x, x_next, log_prob))
            else:
                x_next = self.ode(x, [k, k + 1])
            x = x_next
        scores = self.score(self.finish(x, last + 1, x0_hat))
        for step in steps:
            self.edge(*step, {name: [score] for name, score in scores.items()})

    # ------------------------------------------------------------------ credit and loss

    def assign_advantages(self) -> None:
        """Set the advantage of every edge: the standard scores of its values in its group."""
        method, weights = self.method, self.config.reward_weights
        if method.reward_weights == "sum_to_one":
            weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for edge in self.edges:
            channels = range(len(edge.values["red"]))
            if method.reward_mix == "reward":
                total = sum(
                    self._standard_score(
                        edge, lambda e, c=c: sum(w * e.values[n][c] for n, w in weights.items())
                    )
                    for c in channels
                )
            else:
                total = sum(
                    w * self._standard_score(edge, lambda e, n=n, c=c: e.values[n][c])
                    for n, w in weights.items()
                    for c in channels
                )
            edge.advantage = float(np.clip(total, -method.advantage_clip, method.advantage_clip))

    def _standard_score(self, edge, value_of) -> float:
        method = self.method
        group = [
            e
            for e in self.edges
            if e.prompt == edge.prompt
            and (method.comparison == "prompt" or e.k == edge.k)
            and (method.comparison != "parent" or e.x is edge.x)
        ]
        values = np.array([value_of(e) for e in group])
        spread = values
        if method.std_scope == "global":
            spread = np.array([value_of(e) for e in self.edges])
        std = spread.std(ddof=int(method.std_unbiased))
        return (value_of(edge) - values.mean()) / (std + method.std_epsilon)

    def store_old_velocities(self) -> None:
        """Store the velocities before any update: those of the old policy and of the reference."""
        with torch.no_grad():
            self.old_v = {id(e): self.v(e.x, e.k, e.prompt) for e in self.edges}

    def loss(
        self, edge: NaiveEdge, guard: bool = False, step_weights: Sequence[float] | None = None
    ) -> Tensor:
        """The loss of an edge under the current policy."""
        method = self.method
        v = self.v(edge.x, edge.k, edge.prompt)
        mean, std = self.transition(edge.x, v, edge.k, edge.end)
        # The policy before the rollout is the old policy and the reference.
        old, _ = self.transition(edge.x, self.old_v[id(edge)], edge.k, edge.end)
        dt = self.sigma[edge.end] - self.sigma[edge.k]
        log_ratio = self.log_prob(edge.x_next, mean, std) - edge.log_prob
        distance = ((mean - old) ** 2).mean() / (2 * std**2)
        if guard:
            log_ratio = std * (log_ratio + distance)
        ratio, advantage = log_ratio.exp(), edge.advantage
        bound = ratio.clamp(1 - method.clip_range, 1 + method.clip_range)
        loss = -torch.min(ratio * advantage, bound * advantage)
        if hasattr(method, "trust_region"):
            toward = ratio > 1 if advantage > 0 else ratio < 1
            kept = not (toward and distance >= method.trust_region)
            loss = -ratio * advantage * kept
        if guard:
            loss = loss / -dt
        if step_weights is not None:  # of the policy loss only
            loss = loss * step_weights[edge.k]
        if method.kl_weight:
            exact = method.kl_form == "gaussian" or method.sde_type == "cps"
            loss = loss + method.kl_weight * distance * (1 if exact else -dt)
        return loss

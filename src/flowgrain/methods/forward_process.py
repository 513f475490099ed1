"""Base class of methods that train on finished images, and options that they share."""

from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Strict
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization
from flowgrain.core.regression import Noised, Quantities, squared_error
from flowgrain.core.tree import Planner, Tree
from flowgrain.methods.base import Method
from flowgrain.methods.plans import initial_noise
from flowgrain.settings import Setting

Levels = Literal["grid", "binned_grid", "logit_normal", "uniform", "binned", "toward_noise"]
Range = Annotated[tuple[float, float], Strict(False)]


class NoiseLevels(NamedTuple):
    """Noise levels of the draws of I images.

    Attributes:
        sigma: [I, N] noise levels.
        number: [I, N] numbers from which the noise of a draw is derived. They differ within an
            image.
    """

    sigma: NDArray[np.float32]
    number: NDArray[np.int64]


class ForwardProcess(Method):
    """A method that trains on finished images by adding noise to them again.

    The trees have no trained edges. A draw is a noise level and a noise of an image. A method
    implements `loss`, or, if the loss of a draw depends on other draws, `quantity` and
    `group_loss`.
    """

    summary = (
        "The images of a group are compared with each other. No step of the sampler is trained."
    )

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        """Write `group_size` images by the ODE."""
        for root in initial_noise(tree, self.group_size, shared=False):
            via = range(1, tree.num_steps + 1)
            tree.image(tree.ode(root, via=list(via), order=self.tail_order))

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """One advantage per image, normalized within the prompt."""
        return credit.per_image(tree, rewards, how)

    def selected(self, advantage: Tensor, group: Tensor) -> Tensor:
        """Whether an image is trained [I], as booleans. Default: all images.

        The number of selected images of a group must only depend on the size of the group. It is
        part of the cost, and all ranks must run the same number of forward passes.

        Args:
            advantage: [I].
            group: [I] number of the prompt.
        """
        return torch.ones_like(advantage, dtype=torch.bool)

    def loss(self, x: Noised) -> Tensor:
        """Loss [B] of every draw. Not used if `reduces`."""
        raise NotImplementedError(f"method {self.name!r} must implement loss or group_loss")

    def quantity(self, x: Noised) -> Tensor:
        """Number [B] of every draw that `group_loss` or the ratio of `loss` depends on."""
        return squared_error(x.v, x.target)

    def group_loss(self, q: Quantities) -> Tensor:
        """Losses [I, N] of the draws of whole groups. Only used if `reduces`."""
        raise NotImplementedError(f"method {self.name!r} must implement group_loss")

    def regularizer(self, x: Noised) -> Tensor | None:
        """Loss [B] that is added to every draw: `kl_weight` times the squared distance to v_ref."""
        if not self.kl_weight:
            return None
        assert x.reference is not None
        return self.kl_weight * squared_error(x.v, x.reference)

    def num_levels(self, num_steps: int) -> int:
        """Number of draws of every image."""
        raise NotImplementedError(f"method {self.name!r} must implement num_levels")

    def draw_levels(
        self, random: np.random.Generator, count: int, sigmas: NDArray[np.float32]
    ) -> NoiseLevels:
        """Noise levels of `count` images: different levels of the sampling grid.

        Args:
            random: random numbers of the training step.
            count: number of images, or of groups if `shares_draws`.
            sigmas: [T + 1] sampling grid.
        """
        num_steps = len(sigmas) - 1
        indices = np.tile(np.arange(*self.grid_range(num_steps)), (count, 1))
        chosen = random.permuted(indices, axis=1)[:, : self.num_levels(num_steps)]
        return NoiseLevels(sigmas[chosen], chosen)

    def grid_range(self, num_steps: int) -> tuple[int, int]:
        """The first grid index that is drawn, and the one after the last."""
        return 0, num_steps

    @property
    def shares_draws(self) -> bool:
        """Whether all images of a group have the same noise levels and noise."""
        return False

    @property
    def trains_guided(self) -> bool:
        """Whether the losses use the guidance of sampling. Embedded guidance is always used."""
        return True

    @property
    def reduces(self) -> bool:
        """Whether the loss is `group_loss`, which needs the quantities of a whole group at once."""
        return False

    @property
    def needs_quantity(self) -> bool:
        """Whether `loss` needs the quantity under the policy that sampled."""
        return self.reduces

    @property
    def needs_old(self) -> bool:
        """Whether the loss needs the velocity of the slowly moving policy."""
        return False

    @property
    def old_samples(self) -> bool:
        """Whether the slowly moving policy samples. Otherwise the trained policy samples."""
        return self.needs_old

    @property
    def compares_slow(self) -> bool:
        """Whether the old quantity is that of the slowly moving policy.

        Otherwise it is that of the trained policy before the first update of the rollout.
        """
        return self.old_samples

    @property
    def regularizes_old(self) -> bool:
        """Whether `regularizer` needs the velocity of the slowly moving policy."""
        return False

    @property
    def reduces_reference(self) -> bool:
        """Whether `group_loss` needs the quantity under the reference."""
        return False

    def decay(self, updates: int) -> float:
        """Share of its parameters that the slowly moving policy keeps after a rollout.

        Args:
            updates: optimizer updates since the start of training, including this rollout's.
        """
        return 0.0

    def frozen_passes(self, rows: int, later_rows: int) -> int:
        """Forward passes without gradient in the updates of a rollout.

        Args:
            rows: draws of all updates.
            later_rows: draws of all updates except the first.
        """
        if self.reduces:  # quantities of all draws come before the loss of a draw
            first = 1 + self.compares_slow + self.reduces_reference
            # The velocity of the reference is kept for the KL.
            kl = self.kl_weight > 0 and not self.reduces_reference
            per_row = first + self.regularizes_old + kl
        else:
            per_row = self.needs_old + self.needs_reference
        starts = self.needs_quantity and not self.compares_slow
        return rows * per_row + (later_rows if starts else 0)

    def published_passes(self, num_steps: int) -> int:
        """See `Method.published_passes`."""
        return num_steps * self.group_size

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        if self.updates_per_rollout == "per_step":
            raise ValueError(
                f"updates_per_rollout=per_step: method {self.name!r} trains no steps. Use a number."
            )
        count = self.num_levels(num_steps)
        if count < 1:
            raise ValueError(f"the {num_steps} steps of the grid have no level to train on.")


OF_DECAY = ("max_decay", "decay_rate", "decay_start")
"""Options of the slowly moving policy."""


class SlowPolicy(ForwardProcess):
    """Options of methods with a copy of the policy that moves slowly."""

    max_decay: float = Setting(
        0.5, "Largest share of its parameters that the old policy keeps per rollout.", ge=0, lt=1
    )
    decay_rate: float = Setting(
        0.001, "Growth of the kept share per optimizer update, up to max_decay.", ge=0, le=1
    )
    decay_start: int = Setting(
        0,
        "Optimizer updates after which the kept share starts to grow. Before, it is 0. A negative "
        "number: the share starts above 0.",
        unit="updates",
        ge=-10_000_000,
        le=10_000_000,
    )

    @property
    def needs_old(self) -> bool:
        """Whether the loss needs the velocity of the slowly moving policy."""
        return True

    def decay(self, updates: int) -> float:
        """See `ForwardProcess.decay`."""
        return min(self.decay_rate * max(updates - self.decay_start, 0), self.max_decay)


class SlowAnchor(SlowPolicy):
    """Options of methods whose slowly moving policy is an anchor. The trained policy samples."""

    @property
    def old_samples(self) -> bool:
        """Whether the slowly moving policy samples."""
        return False


class FractionOfGrid(ForwardProcess):
    """Option of methods that draw a share of the levels of the sampling grid for every image."""

    timestep_fraction: float = Setting(
        0.99, "Share of the grid's noise levels to train on, drawn for every image.", gt=0, le=1
    )

    def num_levels(self, num_steps: int) -> int:
        """Number of draws of every image."""
        return max(1, int(num_steps * self.timestep_fraction))


class Draws(ForwardProcess):
    """Options of the draws of noise levels."""

    draws: int = Setting(
        4, "Draws of noise level and noise for every image (N).", unit="draws", ge=1, le=1000
    )
    levels: Levels = Setting(
        "grid",
        "Noise levels: different levels of the sampling grid (grid), one grid level in each of N "
        "equal bins (binned_grid), places on the grid with a logit-normal distribution "
        "(logit_normal), uniform in 0..1 (uniform), uniform in each of N equal bins of "
        "0..1 (binned), or with density 2 t in 0..1 (toward_noise).",
    )
    level_range: Range = Setting(
        (0.0, 1.0), "Part of the grid, or of 0..1, from which noise levels are drawn."
    )
    shared_draws: bool = Setting(
        False, "All images of a group have the same noise levels and the same noise."
    )

    def num_levels(self, num_steps: int) -> int:
        """Number of draws of every image."""
        if self.levels != "grid":
            return self.draws
        first, last = self.grid_range(num_steps)
        return min(self.draws, last - first)

    @property
    def shares_draws(self) -> bool:
        """Whether all images of a group have the same noise levels and noise."""
        return self.shared_draws

    def draw_levels(
        self, random: np.random.Generator, count: int, sigmas: NDArray[np.float32]
    ) -> NoiseLevels:
        """See `ForwardProcess.draw_levels`."""
        if self.levels == "grid":
            return super().draw_levels(random, count, sigmas)
        n = self.draws
        number = np.tile(np.arange(n), (count, 1))
        if self.levels == "binned_grid":
            first, last = self.grid_range(len(sigmas) - 1)
            edges = np.linspace(first, last, n + 1).astype(int)
            low, high = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
            return NoiseLevels(sigmas[random.integers(low, high, size=(count, n))], number)
        if self.levels == "logit_normal":
            return NoiseLevels(self._logit_normal(random, count, sigmas), number)
        parts = random.random((count, n))
        if self.levels == "binned":
            parts = (number + parts) / n
        if self.levels == "toward_noise":
            parts = np.sqrt(parts)
        start, stop = self.level_range
        return NoiseLevels((start + (stop - start) * parts).astype(np.float32), number)

    def _logit_normal(
        self, random: np.random.Generator, count: int, sigmas: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Levels [count, N] at logit-normal places of the grid, interpolated between its levels."""
        start, stop = self.level_range
        place = 1 / (1 + np.exp(-random.standard_normal((count, self.draws))))
        index = (start + (stop - start) * place) * (len(sigmas) - 1)
        return np.interp(index, np.arange(len(sigmas)), sigmas).astype(np.float32)

    def grid_range(self, num_steps: int) -> tuple[int, int]:
        """See `ForwardProcess.grid_range`."""
        start, stop = self.level_range
        return int(start * num_steps), int(stop * num_steps)

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        start, stop = self.level_range
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"level_range={list(self.level_range)}: use two rising numbers between 0 and 1."
            )
        first, last = self.grid_range(num_steps)
        if "grid" in self.levels and last <= first:
            raise ValueError(
                f"level_range={list(self.level_range)}: contains no level of a grid with "
                f"sampling.num_steps={num_steps}. Use a wider range."
            )
        super().check(num_steps)

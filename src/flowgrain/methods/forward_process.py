"""Base class of methods that train on finished images."""

from abc import abstractmethod

from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization
from flowgrain.core.tree import Tree
from flowgrain.methods.base import Method


class ForwardProcess(Method):
    """A method that trains on finished images by adding noise to them again.

    The old policy samples. After every rollout it moves toward the trained policy. The trees have
    no trained edges.
    """

    @abstractmethod
    def loss(
        self, v: Tensor, v_old: Tensor, target: Tensor, sigma: Tensor, advantage: Tensor
    ) -> Tensor:
        """Loss [B] of noised images.

        Args:
            v: [B, *L] velocity of the trained policy.
            v_old: [B, *L] velocity of the old policy.
            target: [B, *L] eps - x0.
            sigma: [B] noise levels.
            advantage: [B].
        """

    @abstractmethod
    def num_levels(self, num_steps: int) -> int:
        """Number of noise levels that are drawn for every image."""

    @abstractmethod
    def decay(self, updates: int) -> float:
        """Share of its parameters that the old policy keeps after a rollout.

        Args:
            updates: optimizer updates since the start of training, including this rollout's.
        """

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """One advantage per image, normalized within the prompt."""
        return credit.per_image(tree, rewards, how)

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        if self.updates_per_rollout == "per_step":
            raise ValueError(
                f"updates_per_rollout=per_step: method {self.name!r} trains no steps. Use a number."
            )

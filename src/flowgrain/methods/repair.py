"""Base class of methods that regress on images repaired along the gradient of their reward."""

from abc import abstractmethod

from torch import Tensor

from flowgrain.core.mend import nearest_level
from flowgrain.core.tree import Planner
from flowgrain.methods.forward_process import SlowPolicy
from flowgrain.methods.plans import initial_noise
from flowgrain.methods.reward_gradient import OF_ADVANTAGES, DifferentiableReward
from flowgrain.settings import Setting


class Repair(SlowPolicy, DifferentiableReward):
    """A method that moves images along the gradient of their reward, and regresses on the moves.

    The slowly moving policy samples images by the ODE. An image below its cap gets candidates. The
    trained policy learns the accepted moves at one state of the sampled trajectory, which the plan
    keeps. Its other images keep their x0 estimate.
    """

    trained_sigma: float = Setting(
        0.278,
        "Noise level of the regression. The state of the trajectory at the nearest level of the "
        "grid is used.",
        gt=0,
        le=1,
    )

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        """Write `group_size` images by the ODE, and keep the state of the regression."""
        state = nearest_level(tree.sigmas, self.trained_sigma)
        for root in initial_noise(tree, self.group_size, shared=False):
            node = tree.ode(root, via=list(range(1, state + 1)), order=self.tail_order)
            tree.keep(node)
            rest = list(range(state + 1, tree.num_steps + 1))
            tree.image(tree.ode(node, via=rest, order=self.tail_order))

    def num_levels(self, num_steps: int) -> int:
        """One: an image is trained at one noise level."""
        return 1

    @property
    @abstractmethod
    def num_candidates(self) -> int:
        """K, candidates of an image below its cap."""

    @abstractmethod
    def caps(self, reward: Tensor, group: Tensor) -> Tensor:
        """Caps [I] of the images of a rollout. An image with a smaller reward gets candidates.

        Args:
            reward: [I] weighted sums of the rewards. NaN marks an image without a score.
            group: [I] number of the prompt.
        """

    @abstractmethod
    def moves(self, slope: Tensor) -> Tensor:
        """Displacements [K, B, *L] of the candidates.

        Args:
            slope: [B, *L] gradients of the reward with respect to the image.
        """

    @abstractmethod
    def choose(self, reward: Tensor, candidates: Tensor, cap: Tensor, moves: Tensor) -> Tensor:
        """Number [B] of the accepted candidate of every image, or -1.

        Args:
            reward: [B] rewards of the images.
            candidates: [K, B] rewards of the candidates.
            cap: [B].
            moves: [K, B, *L].
        """

    @abstractmethod
    def weights(self, repaired: Tensor, kept: Tensor) -> Tensor:
        """Weights [I] of the losses of an update, which are summed.

        Args:
            repaired: [I] whether the image has an accepted candidate.
            kept: [I] whether it has a score and no accepted candidate.
        """

    @abstractmethod
    def loss_of_move(self, v: Tensor, old: Tensor, sigma: Tensor, move: Tensor) -> Tensor:
        """Loss [B] of the velocities `v` and `old` [B, *L] at the kept state, for a move [B, *L].

        Args:
            v: velocity of the trained policy.
            old: velocity of the slowly moving policy.
            sigma: [B] noise level of the state.
            move: accepted displacement, or 0.
        """

    @abstractmethod
    def end_rollout(self, reward: Tensor, repaired: int, failing: int) -> None:
        """Change the state of the method after the updates of a rollout.

        Args:
            reward: [I] as in `caps`.
            repaired: number of images with an accepted candidate.
            failing: number of images below their cap.
        """

    @abstractmethod
    def round_metrics(self, reward: Tensor) -> dict[str, float]:
        """State of the method in a rollout with rewards [I], by name, for the metrics."""

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        super().check(num_steps)
        self.check_unused(OF_ADVANTAGES)

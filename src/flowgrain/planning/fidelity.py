"""How well a cheaper rollout ranks the samples of a group, and what it saves: `flowgrain fidelity`.

Nothing is trained.

Shapes: K comparison groups, E trained edges, I images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from flowgrain.config.rollout import without_workers
from flowgrain.config.schema import Config
from flowgrain.config.show import differences
from flowgrain.core.tree import Tree
from flowgrain.distributed.threads import set_threads
from flowgrain.planning.plan import prompt_cost
from flowgrain.settings import SettingsError
from flowgrain.training.collect import RolloutCollector
from flowgrain.training.load import compute_device, load_model, load_prompts, load_rewards
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch

_MAY_DIFFER = (
    "name",
    "sampling.batch_size",
    "sampling.guidance_scale",
    "sampling.prompts_per_chunk",
    "sampling.tail_cache",
    "sampling.tail_weights",
)
"""Settings outside of the method in which a cheaper rollout of the same policy may differ."""


@dataclass(frozen=True)
class Fidelity:
    """A cheaper rollout in comparison with the full rollout.

    Attributes:
        correlation: [K] Spearman's rank correlation of the advantages of every comparison group.
        flipped: share of the advantages whose sign differs.
        seconds: time of the cheaper rollout as a share of the full rollout's, median over steps.
        passes: its sampling forward passes as a share of the full rollout's.
    """

    correlation: NDArray[np.float64]
    flipped: float
    seconds: float
    passes: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers. The correlation is given by its median and its 10% and 90% quantiles."""
        low, median, high = float("nan"), float("nan"), float("nan")
        if len(self.correlation):
            low, median, high = np.quantile(self.correlation, (0.1, 0.5, 0.9)).tolist()
        return {
            "spearman": median,
            "spearman_10": low,
            "spearman_90": high,
            "flipped": self.flipped,
            "seconds": self.seconds,
            "passes": self.passes,
        }


def fidelity(full: Config, cheap: Config, steps: int = 3) -> Fidelity:
    """Sample the trees of `steps` training steps with both configurations, from the same noise.

    Args:
        full: configuration of the run.
        cheap: the same policy with a cheaper rollout: other ODE tails, fewer completions.
        steps: number of training steps.

    Raises:
        SettingsError: the two configurations differ in more than the rollout, or do not train the
            same edges.
    """
    check_comparable(full, cheap, steps)
    collectors = _collectors(full, cheap)
    batches: list[tuple[RolloutBatch, RolloutBatch]] = []
    shares = []
    for step in range(1, steps + 1):
        (reference, slow), (other, fast) = (_timed(each, step) for each in collectors)
        batches.append((reference, other))
        shares.append(fast / slow)
    correlations: list[float] = []
    flips = []
    for reference, other in batches:
        groups = _comparison_groups(full, reference)
        correlations += _rank_correlations(groups, reference.advantage, other.advantage)
        flips.append(_flipped(reference.advantage, other.advantage))
    passes = prompt_cost(cheap).forward_passes / prompt_cost(full).forward_passes
    flipped = float(torch.stack(flips).mean())
    return Fidelity(np.array(correlations), flipped, float(np.median(shares)), passes)


def check_comparable(full: Config, cheap: Config, steps: int) -> None:
    """Check that `cheap` is another rollout of the same policy, which trains the same edges.

    Raises:
        SettingsError: it is not. The message names the first setting that may not differ.
    """
    for path, _, value in differences(full, cheap):
        if not path.startswith("method.") and path not in _MAY_DIFFER:
            raise SettingsError(
                f"--cheap {path}={value}: both rollouts must use the same policy and data. "
                f"Change only options of the method, or {', '.join(_MAY_DIFFER[1:])}."
            )
    for step in range(1, steps + 1):
        if not _same_edges(full.tree(step), cheap.tree(step)):
            raise SettingsError(
                "--cheap: the two rollouts do not train the same edges. "
                "Change how images are completed, not which steps are trained."
            )


def _same_edges(a: Tree, b: Tree) -> bool:
    """Whether two trees train the same grid steps with the same noise samples."""
    if not len(a.edges):  # a method that trains on images
        return not len(b.edges) and len(a.leaves) == len(b.leaves)
    columns = ((t.grid_index[t.edges], t.draw[t.edges]) for t in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(*columns, strict=True))


def _collectors(full: Config, cheap: Config) -> Sequence[RolloutCollector]:
    """A collector per configuration, over one policy with the weights before training."""
    set_threads(full.runtime.threads)
    rewards, _ = load_rewards(full)
    backbone = load_model(full, train=False)
    prompts = load_prompts(full, backbone, "train")
    policy = Policy.for_sampling(full, backbone, compute_device(full.runtime.device))
    without = {"training.graph_memory": 0.0}  # no update follows
    configs = [
        without_workers(c).with_grid_of(backbone).with_changes(without) for c in (full, cheap)
    ]
    return [RolloutCollector(c, c.method, policy, rewards, prompts) for c in configs]


def _timed(collector: RolloutCollector, step: int) -> tuple[RolloutBatch, float]:
    """The rollout batch of a training step, and the seconds it took."""
    begin = time.perf_counter()
    return collector.collect(step), time.perf_counter() - begin


def _comparison_groups(config: Config, batch: RolloutBatch) -> Tensor:
    """Comparison group of every advantage of `batch`."""
    if len(batch.tree.edges):
        return config.method.normalization().groups(batch.tree)
    return torch.from_numpy(batch.tree.prompt[batch.tree.leaves])


def _rank_correlations(groups: Tensor, a: Tensor, b: Tensor) -> list[float]:
    """Spearman's correlation of `a` and `b` in every group in which both vary."""
    found = []
    for group in np.unique(groups.numpy()):
        members = groups == group
        if a[members].std() > 0 and b[members].std() > 0:
            found.append(float(stats.spearmanr(a[members], b[members]).statistic))
    return found


def _flipped(a: Tensor, b: Tensor) -> Tensor:
    """The share of advantages with different signs. Pairs of zeros are not counted."""
    known = (a != 0) & (b != 0)
    return (a.sign() != b.sign())[known].float().mean()

"""The sampling of a training step: exploration and adaptive groups choose what is sampled.

Without them, the tree of every prompt is sampled once, as the method plans it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flowgrain.core.rollout import Noise
from flowgrain.core.tree import Tree
from flowgrain.data import Prompt
from flowgrain.rewards import GroupReward, Reward, Scores
from flowgrain.settings import SettingsError
from flowgrain.training.adaptive import Spread, replacements, sample_adaptively
from flowgrain.training.explore import cheap_config, exact_score, explore
from flowgrain.training.health import check_failed_rewards
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.scored_tree import ScoredTree

if TYPE_CHECKING:
    from flowgrain.training.collect import RolloutCollector


@dataclass(frozen=True)
class SampledStep:
    """The sampled and scored trees of a training step.

    Attributes:
        prompts: prompts of all ranks.
        scored: their trees. Forward passes of samples that are not trained are counted.
        noise: noise of the trees.
        more_decodes: images of all ranks that were decoded and scored, but are not trained.
        metrics: metrics of exploration and adaptive groups.
    """

    prompts: list[Prompt]
    scored: ScoredTree
    noise: Noise
    more_decodes: int = 0
    metrics: Metrics = field(default_factory=dict)


def sample_step(
    collector: RolloutCollector, plan: Tree, prompts: list[Prompt], noise: Noise, step: int
) -> SampledStep:
    """Sample and score the trees of training step `step`.

    Args:
        collector: samples and scores a tree.
        plan: tree of one prompt.
        prompts: prompts of all ranks.
        noise: noise of the training step.
        step: training step, from 1.

    Raises:
        RunStopped: too many rewards of candidates failed.
        StopRequested: a signal arrived.
        Diverged: too many images contain NaN or infinity.
    """
    config = collector.config
    if config.sampling.explore.candidates:
        return _explored(collector, plan, prompts, noise)
    measured, kernel = config.watch.action != "off", collector.kernel()

    def sample(tree: Tree, prompts: Sequence[Prompt], noise: Noise) -> ScoredTree:
        return collector.score_tree(tree, prompts, kernel, noise, measured)

    settings = config.training.adaptive_groups
    if not settings.probe:
        return SampledStep(prompts, collector.source.score(step, prompts, plan), noise)
    spread = Spread(collector.reward_weights, collector.method.reward_mix, settings.min_spread)
    others = replacements(collector.prompts, prompts, step, config.runtime.seed)
    groups = sample_adaptively(
        settings, plan, prompts, others, spread, noise, sample, collector.world
    )
    return SampledStep(groups.prompts, groups.scored, noise, groups.decodes, groups.metrics)


def check_group_rewards(probe: int, rewards: Mapping[str, Reward]) -> None:
    """Check that every reward can score the first `probe` images of a group. 0: all images.

    Raises:
        SettingsError: a reward compares the images of a whole group.
    """
    for name, reward in rewards.items():
        if probe and isinstance(reward, GroupReward):
            raise SettingsError(
                f"training.adaptive_groups.probe={probe}: reward {name!r} compares the images of a "
                "whole group, so it cannot score a part of it. Remove the setting."
            )


def cheap_collector(collector: RolloutCollector) -> RolloutCollector:
    """The collector of candidates: `collector`, or another with approximate tails.

    Raises:
        SettingsError: this model or device does not support the approximate tails.
    """
    cheap = cheap_config(collector.config)
    if cheap is collector.config:
        return collector
    try:
        return type(collector)(
            cheap,
            collector.method,
            collector.policy,
            collector.rewards,
            collector.prompts,
            collector.world,
            collector.timer,
        )
    except SettingsError as error:
        message = str(error).replace("sampling.tail_", "sampling.explore.tail_")
        raise SettingsError(message) from error


def _explored(
    collector: RolloutCollector, plan: Tree, prompts: list[Prompt], noise: Noise
) -> SampledStep:
    """The step with the draws that exploration has chosen."""
    config, kernel = collector.config, collector.kernel()

    def sample_cheaply(tree: Tree, noise: Noise) -> tuple[Mapping[str, Scores], int]:
        scored = collector.cheap.score_tree(tree, prompts, kernel, noise)
        check_failed_rewards(scored.scores, config.training.max_failed_rewards)
        return scored.scores, scored.rollout.forward_passes

    weights = collector.reward_weights
    found = explore(config, plan, len(prompts), noise, sample_cheaply, weights)
    measured = config.watch.action != "off"
    scored = collector.score_tree(plan, prompts, kernel, found.noise, measured, trains=True)
    tree, ranks = plan.repeat(len(prompts)), collector.world.data_size
    values = {name: scores.values for name, scores in scored.scores.items()}
    metrics = found.metrics(
        tree, exact_score(tree, values, weights, config.method.reward_mix), ranks
    )
    passes = scored.rollout.forward_passes + found.forward_passes
    rollout = replace(scored.rollout, forward_passes=passes)
    return SampledStep(
        prompts, replace(scored, rollout=rollout), found.noise, found.decodes, metrics
    )

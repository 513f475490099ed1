"""Collection of a rollout batch: sample a tree, decode and score its leaves, assign advantages.

Shapes: P prompts, N rows of a tree, I images, *L latent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core import credit
from flowgrain.core.graphs import GraphKeeper
from flowgrain.core.rollout import Noise, Rollout, TailVelocity, concatenate, rollout
from flowgrain.core.sde import ODE, Kernel
from flowgrain.core.tree import Ints, Tree
from flowgrain.data import Prompt, keyed_noise, prompts_of_step
from flowgrain.distributed import SINGLE, World
from flowgrain.methods import (
    ForwardProcess,
    Method,
    Observation,
    PolicyGradient,
    RewardGradient,
)
from flowgrain.methods.calibration import CalibrationResult, calibrate
from flowgrain.models import Conditioning, take
from flowgrain.rewards import Reward, Scorer
from flowgrain.training.decode import Decoded, decode
from flowgrain.training.given import given_batch
from flowgrain.training.graphs import GraphBudget, GraphReuse
from flowgrain.training.health import check_failed_rewards, check_images
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch
from flowgrain.training.rollouts import rollout_source
from flowgrain.training.rollouts.steps import step_noise, step_prompts, step_tree
from flowgrain.training.sample_step import cheap_collector, check_group_rewards, sample_step
from flowgrain.training.scored_tree import ScoredTree, gather_scores
from flowgrain.training.signals import check_stop, interruptible, stop_together
from flowgrain.training.tails import Tails
from flowgrain.training.timer import StageTimer


class RolloutCollector:
    """Collects the rollout batch of a training step.

    Args:
        config: settings of sampling, rewards and training.
        method: plan and credit. Its state may differ from the state of config.method.
        policy: the policy that samples.
        rewards: trained rewards by name.
        prompts: training prompts.
        world: ranks.
        timer: measures the stages.

    Attributes:
        source: executes and scores the trees of training steps, here or in worker processes.
        scores_in_background: whether a thread scores a chunk while the next one is sampled.
    """

    scores_in_background = True

    def __init__(
        self,
        config: Config,
        method: Method,
        policy: Policy,
        rewards: Mapping[str, Reward],
        prompts: Sequence[Prompt],
        world: World = SINGLE,
        timer: StageTimer | None = None,
    ) -> None:
        self.config, self.method, self.policy = config, method, policy
        self.rewards, self.prompts, self.world = rewards, prompts, world
        self.timer = timer or StageTimer(policy.device)
        self.sigmas = config.sigmas().to(policy.device)
        self.tails = Tails(policy, config.sampling)
        self.graph_reuse = GraphReuse(config, policy)
        self.source = rollout_source(config, self)
        weights = config.reward_weights
        self.reward_weights = method.mix_weights({name: weights.get(name, 1.0) for name in rewards})
        check_group_rewards(config.training.adaptive_groups.probe, rewards)
        self.cheap = cheap_collector(self)

    def collect(self, step: int) -> RolloutBatch:
        """The rollout batch of training step `step`."""
        config, method = self.config, self.method
        prompts = step_prompts(config, self.prompts, step)
        if config.data.kind is not None:
            batch = given_batch(config, self.policy, prompts, step, self.world, self.timer)
            return replace(batch, rewards=self.rewards, reward_weights=self.reward_weights)
        prompt_tree = step_tree(config, method, step)
        noise = step_noise(config, self.policy.backbone.latent_shape, step)
        sampled = sample_step(self, prompt_tree, prompts, noise, step)
        prompts, scored, noise = sampled.prompts, sampled.scored, sampled.noise

        tree, normalization = prompt_tree.repeat(len(prompts)), method.normalization()
        values = {name: scores.values for name, scores in scored.scores.items()}
        total = credit.weighted_sum(values, self.reward_weights)
        method.observe(Observation(step, [p.text for p in prompts], tree, total, noise))
        advantage = credit.combine(
            method.credit,
            tree,
            values,
            self.reward_weights,
            normalization,
            method.reward_mix,
            method.advantage_clip,
        )
        trains_images = isinstance(method, ForwardProcess | RewardGradient)
        edge_weight = torch.ones_like(advantage)
        if isinstance(method, PolicyGradient) and method.best_of:
            edge_weight = credit.extremes(advantage, normalization.groups(tree), method.best_of)
        return RolloutBatch(
            step=step,
            prompts=prompts,
            tree=tree,
            world=self.world,
            cond=scored.cond,
            rollout=scored.rollout,
            images=scored.images,
            scores=scored.scores,
            credited=tree.leaves if trains_images else tree.edges,
            advantage=advantage,
            edge_weight=edge_weight,
            known=credit.known(values, method.reward_mix),
            rewards=self.rewards,
            reward_weights=self.reward_weights,
            monitors=scored.monitors,
            more_decodes=sampled.more_decodes,
            metrics=sampled.metrics,
            sampled_with=scored.sampled_with,
        )

    def calibrate(self) -> CalibrationResult:
        """Calibrate the noise of the method on the current policy, and set it in the method.

        Raises:
            TypeError: the method has no stochastic steps.
            RunStopped: too many rewards failed.
        """
        method = self.method
        if not isinstance(method, PolicyGradient):
            raise TypeError(f"method {method.name!r} has no noise to calibrate")
        samples, seed = method.calibration.samples, self.config.runtime.seed

        def score_tree(prompt_tree: Tree, kernel: Kernel, number: int) -> Tensor:
            prompts = prompts_of_step(self.prompts, number, samples, seed)
            noise = keyed_noise(self.policy.backbone.latent_shape, "calibrate", seed, number)
            scores = self.score_tree(prompt_tree, prompts, kernel, noise).scores
            check_failed_rewards(scores, self.config.training.max_failed_rewards)
            values = {name: s.values for name, s in scores.items()}
            return credit.weighted_sum(values, self.reward_weights)

        result = calibrate(method, self.sigmas, score_tree)
        method.set_psi(result.psi)
        return result

    def kernel(self) -> Kernel:
        """The transition of the stochastic steps. ODE for a method without stochastic steps."""
        method = self.method
        return method.kernel(self.sigmas) if isinstance(method, PolicyGradient) else ODE()

    def score_tree(
        self,
        prompt_tree: Tree,
        prompts: Sequence[Prompt],
        kernel: Kernel,
        noise: Noise,
        measured: bool = False,
        trains: bool = False,
        encoded: Conditioning | None = None,
    ) -> ScoredTree:
        """Execute a tree for this rank's share of `prompts`, and decode and score its leaves.

        Prompts are processed in chunks. The rewards of a chunk are computed while the next chunk is
        sampled.

        Args:
            prompt_tree: tree of one prompt.
            prompts: prompts of all ranks.
            kernel: transition of the stochastic steps.
            noise: noise source. A prompt number is the position in `prompts`.
            measured: whether the monitors of the images are measured.
            trains: whether an update follows, which may use the graphs of the rollout.
            encoded: conditioning of this rank's prompts, if they are only a share of the step. The
                caller then checks the images of all shares. Default: encode the prompts.

        Raises:
            StopRequested: a signal arrived.
            Diverged: too many images contain NaN or infinity.
        """
        sampling, timer = self.config.sampling, self.timer
        assigned = self.world.assign(len(prompts))
        mine = [prompts[i % len(prompts)] for i in assigned]
        with timer.measure("encode"):
            cond = self.policy.encode([p.text for p in mine]) if encoded is None else encoded
        budget = self.graph_reuse.budget() if trains else None
        size = sampling.prompts_per_chunk or len(mine)
        rewards = self.rewards if self.world.is_first_of_group else {}
        rollouts, decoded = [], []
        background = self.scores_in_background and size < len(mine)
        with Scorer(rewards, self.config.reward_batch_sizes, background) as scorer:
            for first in range(0, len(mine), size):
                chunk = _Chunk(self, cond, noise, assigned, first, len(prompts), budget)
                tree = prompt_tree.repeat(len(mine[first : first + size]))
                with timer.measure("sample"):
                    rollouts.append(chunk.rollout(tree, kernel))
                with timer.measure("decode"):
                    decoded.append(chunk.decode(rollouts[-1], measured))
                with timer.measure("score"):
                    owners = [mine[first + p] for p in tree.prompt[tree.leaves]]
                    images, groups = decoded[-1].images, self.method.leaf_groups(tree)
                    interruptible(self.world, partial(scorer.submit, images, owners, groups))
            with timer.measure("score"):
                scores = interruptible(self.world, scorer.results) or {}
            stop_together(self.world)
        everything = Decoded.concatenate(decoded)
        if encoded is None:
            check_images(everything.images, self.config.training.max_failed_rewards, self.world)
        whole = concatenate(prompt_tree.repeat(len(mine)), rollouts)
        gathered = gather_scores(self.world, scores, everything.monitors, len(prompts))
        return ScoredTree(cond, whole, everything.images, *gathered)


@dataclass(frozen=True)
class _Chunk:
    """Prompts of this rank that are sampled together.

    first: number of the first prompt. count: prompts of all ranks. budget: memory for graphs.
    """

    collector: RolloutCollector
    cond: Conditioning
    of_assigned: Noise
    assigned: Ints
    first: int
    count: int
    budget: GraphBudget | None

    def rollout(self, tree: Tree, kernel: Kernel) -> Rollout:
        collector = self.collector
        return rollout(
            tree,
            self.velocity,
            kernel,
            collector.sigmas,
            self.noise,
            collector.config.sampling.batch_size,
            tail=self.tail,
            tail_schedule=collector.config.tail_schedule,
            keeper=self.keeper(tree),
        )

    def decode(self, sampled: Rollout, measured: bool) -> Decoded:
        latents, size = sampled.at(sampled.tree.leaves), self.collector.config.sampling.batch_size
        return decode(self.collector.policy, latents, size, measured)

    def keeper(self, tree: Tree) -> GraphKeeper | None:
        if self.budget is None:
            return None
        wanted = np.zeros(len(tree), dtype=np.bool_)
        wanted[tree.trained_parents] = True
        wanted &= self.assigned[self.first + tree.prompt] < self.count  # not of a repeated prompt
        train = partial(self.velocity, of=self.collector.policy.train_velocity)
        return GraphKeeper(train, wanted, self.budget.take_room)

    def velocity(
        self, x: Tensor, sigma: Tensor, prompt: Tensor, of: Callable[..., Tensor] | None = None
    ) -> Tensor:
        cond = take(self.cond, self.first + prompt)
        guidance = self.collector.config.sampling.guidance_scale
        check_stop(self.collector.world)
        of = of or self.collector.policy.rollout_velocity
        return of(x, sigma, cond, guidance)

    def noise(self, prompt: Ints, draw: Ints) -> Tensor:
        return self.of_assigned(self.assigned[self.first + prompt], draw)

    @contextmanager
    def tail(self) -> Iterator[TailVelocity]:
        guidance = self.collector.config.sampling.guidance_scale
        with self.collector.tails.open() as velocity:
            yield lambda x, sigma, prompt, continues: velocity(
                x, sigma, take(self.cond, self.first + prompt), guidance, continues
            )

"""The training step, from prompts to optimizer.step()."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.cost import cost
from flowgrain.distributed import World
from flowgrain.distributed.sharding import set_gradient_sync
from flowgrain.methods import ForwardProcess, Method, PolicyGradient, Repair, RewardGradient
from flowgrain.training.collect import RolloutCollector
from flowgrain.training.forward_process import ForwardProcessLoss
from flowgrain.training.health import check_failed_rewards
from flowgrain.training.losses import RolloutLoss, TermRecord
from flowgrain.training.optimizer import PolicyOptimizer
from flowgrain.training.policy import Policy
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.repair import RepairLoss
from flowgrain.training.reward_gradient import RewardGradientLoss
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.signals import check_stop


def train_step(
    step: int, config: Config, collector: RolloutCollector, optimizer: PolicyOptimizer
) -> tuple[Metrics, RolloutBatch]:
    """Train on one rollout batch: sample, score, assign advantages, update.

    Returns:
        The metrics of the step, and its rollout batch.

    Raises:
        RunStopped: too many rewards failed. No parameter was updated.
        Diverged: too many images contain NaN or infinity. No parameter was updated.
        StopRequested: a signal arrived. No parameter was updated.
    """
    begin = time.perf_counter()
    collector.timer.reset()
    # Sample a tree per prompt, decode and score its leaves, turn rewards into advantages.
    batch = collector.collect(step)
    check_failed_rewards(batch.scores, config.training.max_failed_rewards)
    with collector.timer.measure("update"):
        metrics = update(
            config, collector.method, collector.policy, optimizer, batch, collector.sigmas
        )
    metrics |= rollout_metrics(batch, metrics.get("candidate_decodes", 0))
    if config.rollout.max_staleness:
        metrics["staleness"] = int(batch.sampled_with is not None)
    metrics |= {"seconds": time.perf_counter() - begin, **collector.timer.seconds}
    return metrics, batch


def update(
    config: Config,
    method: Method,
    policy: Policy,
    optimizer: PolicyOptimizer,
    batch: RolloutBatch,
    sigmas: Tensor,
) -> Metrics:
    """Run the optimizer updates of one rollout batch, and return their metrics."""
    losses = rollout_loss(config, method, policy, batch, sigmas)
    return run_updates(losses, policy, optimizer, batch.world)


def run_updates(
    losses: RolloutLoss,
    policy: Policy,
    optimizer: PolicyOptimizer,
    world: World,
    places: Callable[[int], Sequence[int]] = range,
) -> Metrics:
    """Run the optimizer updates of `losses`, and return their metrics.

    The only reduction of losses is sum / global count.

    Args:
        losses: losses of the rollout batch.
        policy: the trained policy.
        optimizer: its optimizer.
        world: ranks.
        places: the updates and micro-batches to run, of a number of them. A rehearsal leaves some
            out.
    """
    losses.prepare()
    record, norms, skipped = TermRecord(), [], 0
    for number in places(len(losses.updates)):
        share, finite_losses = losses.updates[number], []
        last = len(share.micro_batches) - 1
        for place in places(len(share.micro_batches)):
            micro_batch = share.micro_batches[place]
            if number == 0:  # no parameter has changed
                check_stop(world)
            set_gradient_sync(policy.model, place == last or policy.reduces_often)
            terms = losses.terms(number, place)
            loss = terms["loss"].sum() * micro_batch.counts / share.count
            optimizer.backward(loss)
            if micro_batch.counts:
                record.add(terms, number)
                finite_losses.append(terms["loss"].detach())
        norm, was_skipped = optimizer.step(finite_losses)
        norms.append(norm)
        skipped += was_skipped
    losses.finish()
    means = record.means(world, _TERMS)
    return losses.metrics(means, record) | {
        "grad_norm": float(torch.stack(norms).mean()),
        "updates": len(losses.updates),
        "updates/skipped": skipped,
    }


_TERMS = ("loss", "ratio", "clipped", "kl", "clipped/later_updates")


def rollout_loss(
    config: Config, method: Method, policy: Policy, batch: RolloutBatch, sigmas: Tensor
) -> RolloutLoss:
    """The losses of `batch` for this kind of method.

    Raises:
        TypeError: the method derives from none of the three base classes.
    """
    if isinstance(method, PolicyGradient):
        return PolicyGradientLoss(config, method, policy, batch, sigmas)
    if isinstance(method, Repair):
        return RepairLoss(config, method, policy, batch, sigmas)
    if isinstance(method, ForwardProcess):
        return ForwardProcessLoss(config, method, policy, batch, sigmas)
    if isinstance(method, RewardGradient):
        return RewardGradientLoss(config, method, policy, batch, sigmas)
    raise TypeError(
        f"method {method.name!r} must derive from PolicyGradient, ForwardProcess or RewardGradient"
    )


def rollout_metrics(batch: RolloutBatch, more_decodes: int = 0) -> Metrics:
    """Rewards, advantages and cost of a rollout batch.

    Args:
        batch: the rollout batch.
        more_decodes: images that were decoded and scored after the rollout.
    """
    metrics: Metrics = {}
    for name, scores in batch.scores.items():
        metrics[f"reward/{name}"] = float(scores.values.nanmean())
        metrics[f"failed/{name}"] = scores.failed
    for name, values in batch.monitors.items():
        metrics[f"monitor/{name}"] = float(values.nanmean())
    world: World = batch.world
    more_decodes += batch.more_decodes
    return {**metrics, **batch.metrics} | {
        "advantage/std": float(batch.advantage.std()) if len(batch.advantage) > 1 else 0.0,
        "advantage/zero": float((batch.advantage == 0).float().mean()),
        "forward_passes": batch.rollout.forward_passes * world.data_size,
        "decodes": cost(batch.tree).decodes + more_decodes,
    }

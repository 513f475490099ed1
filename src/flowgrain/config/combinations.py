"""Checks of settings that depend on each other."""

from typing import TYPE_CHECKING

from flowgrain.config.economy import check_economy, shortest_tail
from flowgrain.config.graphs import check_graph_memory
from flowgrain.config.noise import check_noise
from flowgrain.config.rollout import check_rollout
from flowgrain.config.runtime import check_runtime
from flowgrain.config.watch import check_name
from flowgrain.core.cost import tail_length
from flowgrain.methods import METHODS, ForwardProcess

if TYPE_CHECKING:
    from flowgrain.config.schema import Config


def check_combinations(config: "Config") -> None:
    """Check the settings of a configuration against each other.

    Raises:
        ValueError: a combination is impossible. The message names it.
    """
    try:
        config.method.check(config.sampling.num_steps)
        config.method.mix_weights(config.reward_weights)
        if config.data.kind is not None:
            config.method.check_unused(config.method.unused_on_data, f"data.{config.data.kind}")
    except ValueError as error:
        raise ValueError(f"method.{error}") from error
    trained, evaluated = list(config.reward_weights), [r.name for r in config.evaluation.rewards]
    config.watch.check(trained, [name for name in evaluated if name not in trained])
    for name in (*trained, *evaluated):
        check_name(name)
    config.lora.check()
    config.sampling.check()
    check_graph_memory(config.training, config.method, config.model.name)
    check_rollout(config)
    kind = config.data.kind
    known = [name for name in METHODS if kind and METHODS.get(name).trains_on == kind]
    config.data.check(config.method.name, config.method.trains_on, known)
    check_noise(config.method, config.sigmas(), config.sampling)
    check_economy(config)
    try:
        _ = config.learning_rate
    except ValueError as error:
        raise ValueError(f"optimizer.learning_rate: {error}") from error
    check_runtime(config.runtime, config.sampling, config.method, config.model.name)
    if isinstance(config.method, ForwardProcess):
        config.sampling.check_exact(config.method.name)
    _check_tail(config)


def _check_tail(config: "Config") -> None:
    """Check that the tail is long enough for a feature cache to have an effect.

    Raises:
        ValueError: it is not.
    """
    cache = config.sampling.tail_cache
    if cache == "none":
        return
    needed = shortest_tail(cache)
    length = tail_length(config.tree())
    if length < needed:
        steps = "step" if length == 1 else "steps"
        raise ValueError(
            f"sampling.tail_cache={cache}: has no effect on a tail of {length} {steps}. "
            f"Remove it, or end the stochastic steps earlier, so that at least {needed} "
            "steps follow."
        )

"""Settings of a run that was given objects from Python."""

from collections.abc import Mapping

from flowgrain.config.schema import Config
from flowgrain.methods import Method
from flowgrain.rewards import Reward, RewardConfig
from flowgrain.settings import SettingsError


def with_given(
    config: Config,
    rewards: Mapping[str, Reward] | None,
    method: Method | type[Method] | None,
) -> Config:
    """`config` with the names of `rewards` and with `method` in place of its own.

    Raises:
        SettingsError: the method does not fit the sampling grid, or there is no reward.
    """
    if rewards is not None:
        if not rewards:
            raise SettingsError("rewards is empty. Give at least one reward.")
        known = config.reward_weights
        specs = [RewardConfig(name=name, weight=known.get(name, 1.0)) for name in rewards]
        config = config.model_copy(update={"rewards": tuple(specs)})
    if method is not None:
        instance = method() if isinstance(method, type) else method
        try:
            instance.check(config.sampling.num_steps)
        except ValueError as error:
            raise SettingsError(f"method.{error}") from error
        config = config.model_copy(update={"method": instance})
    return config

"""Settings of a run that uses objects from Python in place of settings."""

from collections.abc import Mapping

from flowgrain.config.schema import Config
from flowgrain.methods import METHODS, Method
from flowgrain.rewards import Reward, RewardConfig
from flowgrain.settings import SettingsError


def with_given(
    config: Config,
    rewards: Mapping[str, Reward] | None,
    method: Method | type[Method] | None,
) -> Config:
    """`config`, with `rewards` and `method` in place of config.rewards and config.method.

    If config.rewards contains the name of a reward, the reward keeps that weight and batch size.

    Raises:
        SettingsError: the method does not fit the other settings, or there is no reward.
    """
    if rewards is not None:
        if not rewards:
            raise SettingsError("rewards is empty. Give at least one reward.")
        known = {reward.name: reward for reward in config.rewards}
        of_given = []
        for name in rewards:
            reward = known.get(name, RewardConfig(name=name))
            size = reward.batch_size
            of_given.append(RewardConfig(name=name, weight=reward.weight, batch_size=size))
        config = config.model_copy(update={"rewards": tuple(of_given)})
    if method is not None:
        instance = method() if isinstance(method, type) else method
        if instance.name not in METHODS:  # files of the run can be read in this process
            METHODS.register(instance.name)(type(instance))
        config = config.model_copy(update={"method": instance})
    try:
        config.check_combinations()
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return config

"""Velocities of approximate tails, by feature caches and quantized copies of the policy.

Approximate tails only affect rewards. Stochastic steps, and therefore log-probabilities, always use
the exact policy.
"""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from flowgrain.config.sections import SamplingConfig
from flowgrain.models import Conditioning
from flowgrain.models.acceleration import QuantizedCopy, check_tails, feature_cache
from flowgrain.training.policy import Policy

ConditionedTail = Callable[[Tensor, Tensor, Conditioning, float, bool], Tensor]
"""tail(x [B, *L], sigma [B], cond, guidance, continues) -> v [B, *L].

If `continues` is true, each row is the child of the row at the same position in the previous call.
"""


class Tails:
    """The tail velocities for the settings sampling.tail_cache and sampling.tail_weights.

    Args:
        policy: the policy that samples.
        sampling: settings of the tails.

    Raises:
        SettingsError: this model, device or sharding does not support the settings.
    """

    def __init__(self, policy: Policy, sampling: SamplingConfig) -> None:
        self.policy, self.cache = policy, sampling.tail_cache
        check_tails(
            tail_cache=sampling.tail_cache,
            tail_weights=sampling.tail_weights,
            model=policy.model,
            device=policy.device,
            sharded=policy.copies.sampler_sharded,
        )
        self.quantized: QuantizedCopy | None = None
        self._version = policy.version
        if sampling.tail_weights != "same":
            names = policy.copies.block_names
            copy = QuantizedCopy(policy.sampler, names, sampling.tail_weights, policy.dtype)
            self.quantized = copy.to(policy.device)
            policy.compile_blocks(self.quantized.model)

    @contextlib.contextmanager
    def open(self) -> Iterator[ConditionedTail]:
        """Tail velocities inside this context. No other code may call the model in the meantime."""
        policy, source = self.policy, self.policy.sampler
        if self.quantized is not None and self._version != policy.version:
            parameters = zip(policy.parameters, policy.parameters_of(source), strict=True)
            self.quantized.update(dict(parameters))
            self._version = policy.version
        model = self.quantized.model if self.quantized is not None else source
        with feature_cache(model, self.cache) as step:

            def velocity(
                x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float, continues: bool
            ) -> Tensor:
                with step(continues):
                    return policy.sample_velocity(x, sigma, cond, guidance, model)

            yield velocity

"""AdamW on the trained parameters with gradient clipping. Non-finite updates are skipped.

In float16, losses are scaled, because small gradients would round to 0.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.distributed import World
from flowgrain.distributed.sharding import full_tensor
from flowgrain.training.policy import Policy


class PolicyOptimizer:
    """The optimizer of a policy.

    Attributes:
        adamw: torch's optimizer.
        learning_rate: learning rate of the settings.
        scaler: loss scaling for float16. Otherwise disabled.
        skipped_in_a_row: skipped updates since the last successful update.
    """

    def __init__(self, policy: Policy, config: Config, world: World) -> None:
        self.policy, self.settings, self.world = policy, config.optimizer, world
        self.learning_rate = config.learning_rate
        self.adamw = torch.optim.AdamW(
            policy.parameters.values(),
            lr=self.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,  # makes no temporary copies of the parameters
        )
        float16 = policy.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=float16)
        self.skipped_in_a_row = 0

    def scale_rate(self, factor: float) -> None:
        """Set the learning rate to `factor` times the rate of the settings."""
        for group in self.adamw.param_groups:
            group["lr"] = factor * self.learning_rate

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, scaled in float16."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, losses: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """Take an optimizer step, unless a gradient or one of `losses` is not finite on any rank.

        Returns:
            The norm of the gradient, and whether the step was skipped.
        """
        parameters = list(self.policy.parameters.values())
        self.world.sum_gradients(parameters)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        norm = full_tensor(norm)
        # All losses together, so that the host waits once.
        finite = not losses or bool(torch.cat([loss.flatten() for loss in losses]).isfinite().all())
        broken_loss = self.world.any(not finite)
        skipped = self.world.any(not bool(torch.isfinite(norm))) or broken_loss
        if not skipped:
            self.adamw.step()
            self.policy.after_update()
        overflow = self.scaler.is_enabled() and skipped and not broken_loss
        counts = not (overflow and self.scaler.get_scale() > 1)
        if self.scaler.is_enabled():
            self._rescale(skipped, overflow)
        if counts:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.adamw.zero_grad(set_to_none=True)
        return norm, skipped

    def _rescale(self, skipped: bool, overflow: bool) -> None:
        """Adapt the scale of float16 losses: the same scale on all ranks.

        An overflow is normal in the first steps. It only counts as a sign of divergence once the
        scale is 1. A loss that is not finite does not depend on the scale.
        """
        if not skipped:
            self.scaler.update()
            return
        factor = self.scaler.get_backoff_factor() if overflow else 1.0
        self.scaler.update(self.scaler.get_scale() * factor)
        self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    @property
    def diverged(self) -> bool:
        """Whether too many updates in a row were skipped."""
        return self.skipped_in_a_row >= self.settings.max_skipped_updates

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state by name, for a checkpoint. Not copies."""
        return {
            f"optimizer.{kind}.{name}": value
            for name, parameter in self.policy.parameters.items()
            for kind, value in self.adamw.state.get(parameter, {}).items()
        }

    def stepped(self) -> list[str]:
        """Names of the parameters that have an optimizer state."""
        parameters = self.policy.parameters.items()
        return [name for name, parameter in parameters if self.adamw.state.get(parameter)]

    def allocate(self, names: Iterable[str]) -> None:
        """Create the state of the parameters `names`, so that a checkpoint can be read into it."""
        for name in names:
            parameter = self.policy.parameters[name]
            moments = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
            count = torch.zeros((), device=parameter.device)
            self.adamw.state[parameter] = {"step": count, **moments}

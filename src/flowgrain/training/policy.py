"""The policy: a transformer and its copies, the trained parameters and their EMA."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.config.schema import Config
from flowgrain.distributed import SINGLE, World
from flowgrain.distributed.context import split_tokens, sum_input_gradient
from flowgrain.distributed.sharding import copy_into
from flowgrain.models import Backbone, Conditioning, check_training
from flowgrain.settings import SettingsError
from flowgrain.training import checkpoint
from flowgrain.training.copies import Copies, add_adapter, make_copies, names_of_blocks
from flowgrain.training.load import compute_dtype
from flowgrain.training.velocities import Velocities

_READ_TOGETHER = 64
"""Tensors of a checkpoint that are read at the same time."""


class Policy(Velocities):
    """A transformer and its copies, with their parameters.

    Parameters are float32 during training. In bfloat16, sampling uses a copy and training uses
    autocast. A policy trains the transformer of its backbone in place, so a backbone can belong to
    only one policy. Create a policy with `for_training` or `for_sampling`.

    Attributes:
        parameters: trained parameters by name.
        ema: exponential moving average of the parameters, or None.
        updates: number of optimizer updates.
        version: number that increases whenever parameters change.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        copies: Copies,
        device: torch.device,
        world: World = SINGLE,
    ) -> None:
        super().__init__(config, backbone, copies, device)
        self.world = world
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema: Any = None
        self.ema_every = config.training.ema_every
        self.reduces_often = config.runtime.gradient_reduction == "micro_batch"
        self.decode_batch_size = config.sampling.decode_batch_size
        self.updates = 0
        self.version = 0

    @classmethod
    def for_training(
        cls, config: Config, backbone: Backbone, device: torch.device, world: World = SINGLE
    ) -> "Policy":
        """A policy with the copies and the EMA that training needs.

        Raises:
            SettingsError: the backbone cannot be trained with these settings.
        """
        try:
            check_training(backbone, lora=config.lora.rank > 0, sharded=world.size > 1)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        dtype = compute_dtype(config.runtime.dtype, device)
        copies = make_copies(config, backbone, device, dtype, world)
        split_tokens(copies.distinct(), world, device)
        policy = cls(config, backbone, copies, device, world)
        if config.training.ema_decay:
            from diffusers.training_utils import EMAModel  # takes seconds to import

            parameters = list(policy.parameters.values())
            policy.ema = EMAModel(parameters, decay=config.training.ema_decay)
        policy.check_backbone()
        return policy

    @classmethod
    def for_sampling(
        cls, config: Config, backbone: Backbone, device: torch.device, adapter: bool = False
    ) -> "Policy":
        """A policy with a single transformer in the compute dtype.

        Args:
            config: settings of the run.
            backbone: its transformer samples.
            device: device of the transformer.
            adapter: whether to add the LoRA adapter of a run.
        """
        dtype = compute_dtype(config.runtime.dtype, device)
        model = backbone.transformer.to(dtype).eval().requires_grad_(False)
        if adapter:
            add_adapter(config, backbone)
        blocks = names_of_blocks(model, backbone.blocks)
        backbone.to(device)
        model.to(device)
        policy = cls(config, backbone, Copies(model, model, None, None, blocks), device)
        policy.lora = adapter
        return policy

    def parameters_of(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of a copy that are trained in the model, in the same order."""
        of_copy = dict(module.named_parameters())
        return [of_copy[name] for name in self.parameters]

    def train_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] in float32, with gradient if grad mode is enabled."""
        return super().train_velocity(sum_input_gradient(x, self.world), sigma, cond, guidance)

    def after_update(self) -> None:
        """Update the EMA and the sampler after an optimizer step."""
        self.updates += 1
        if self.ema is not None and self.updates % self.ema_every == 0:
            # The decay grows with the number of optimizer updates, not of EMA updates.
            self.ema.optimization_step = self.updates - 1
            self.ema.step(self.parameters.values())
        self.refresh()

    @torch.no_grad()
    def move_old(self, decay: float) -> None:
        """Move the old policy toward the trained policy. It keeps the share `decay` of itself."""
        if self.old is not None:
            parameters = self.parameters.values()
            for slow, parameter in zip(self.parameters_of(self.old), parameters, strict=True):
                slow.lerp_(parameter, 1 - decay)
            self.version += 1

    def refresh(self) -> None:
        """Copy the parameters to the sampler, if it is a copy."""
        self.version += 1
        if self.sampler is not self.model:
            copy_into(self.parameters_of(self.sampler), self.parameters.values())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the EMA parameters inside this context, if there is an EMA.

        At the end the trained parameters are restored exactly.
        """
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        self.refresh()
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())
            self.refresh()

    @contextlib.contextmanager
    def replaced(self, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Use `tensors` as the parameters of the model, but not of a copy, inside this context.

        At the end the trained parameters are restored exactly. None: they are not replaced.
        """
        if tensors is None:
            yield
            return
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        self._fill(tensors)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters, EMA and old policy by name, for a checkpoint. Not copies."""
        names = self.parameters
        tensors: dict[str, Tensor] = {f"weights.{name}": p.detach() for name, p in names.items()}
        if self.ema is not None:
            tensors |= {f"ema.{n}": p for n, p in zip(names, self.ema.shadow_params, strict=True)}
        if self.old is not None:
            old = self.parameters_of(self.old)
            tensors |= {f"old.{n}": p.detach() for n, p in zip(names, old, strict=True)}
        return tensors

    def state_dict(self) -> dict[str, int]:
        """Counters for a checkpoint."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counters, after the checkpoint was read into `tensors`."""
        self.updates = state["updates"]
        self.refresh()

    @torch.no_grad()
    def load_for_sampling(self, path: Path) -> None:
        """Load the EMA parameters of checkpoint `path`, or without EMA the trained parameters.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        state = checkpoint.load(path)
        try:
            kind = "ema" if state["config"]["training"]["ema_decay"] else "weights"
        except (KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(
                f"the checkpoint {path} is damaged: it contains no settings"
            ) from error
        parameters = self.parameters or dict(self.model.named_parameters())
        names = list(parameters)
        for first in range(0, len(names), _READ_TOGETHER):  # limits the memory of float32 buffers
            chunk = names[first : first + _READ_TOGETHER]
            stored = {f"{kind}.{name}": torch.empty(parameters[name].shape) for name in chunk}
            checkpoint.read(path, stored)
            for name in chunk:
                parameters[name].copy_(stored[f"{kind}.{name}"])

"""The policy: a transformer, its copies, and the velocities that training and evaluation ask of them.

Shapes: B rows, *L latent.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.config.schema import Config
from flowgrain.distributed import SINGLE, World
from flowgrain.distributed.sharding import copy_into
from flowgrain.models import Backbone, Conditioning, CustomGuidance, take
from flowgrain.training import checkpoint
from flowgrain.training.copies import Copies, add_adapter, make_copies, names_of_blocks
from flowgrain.training.load import compute_dtype

_READ_TOGETHER = 64


class Policy:
    """A transformer and its copies.

    Parameters are float32 during training. In bfloat16, sampling uses a copy and training uses
    autocast. A backbone belongs to one policy, which trains it in place. Create a policy with
    `for_training` or `for_sampling`.

    Attributes:
        model: the trained transformer.
        sampler: the transformer that samples; may be `model`.
        reference: the transformer before training, if a full fine-tune needs it.
        old: the old policy of a forward-process method, which then samples rollouts.
        parameters: trained parameters by name.
        ema: exponential moving average of the parameters, or None.
        version: increases whenever parameters change.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        copies: Copies,
        device: torch.device,
        world: World = SINGLE,
    ) -> None:
        self.backbone, self.copies, self.device, self.world = backbone, copies, device, world
        self.model, self.sampler = copies.model, copies.sampler
        self.reference, self.old = copies.reference, copies.old
        self.dtype = compute_dtype(config.runtime.dtype, device)
        self.lora = config.lora.rank > 0
        self.compile_backend = config.runtime.compile
        self.batch_sizes = _compiled_sizes(config)
        for module in copies.distinct():
            self.compile_blocks(module)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema: Any = None
        self.ema_every = config.training.ema_every
        self.updates = 0
        self.version = 0
        self.unconditional: Conditioning = {}

    @classmethod
    def for_training(
        cls, config: Config, backbone: Backbone, device: torch.device, world: World = SINGLE
    ) -> "Policy":
        """A policy with the copies and the EMA that training needs."""
        dtype = compute_dtype(config.runtime.dtype, device)
        policy = cls(
            config, backbone, make_copies(config, backbone, device, dtype, world), device, world
        )
        if config.training.ema_decay:
            from diffusers.training_utils import EMAModel  # takes seconds to import

            parameters = list(policy.parameters.values())
            policy.ema = EMAModel(parameters, decay=config.training.ema_decay)
        return policy

    @classmethod
    def for_sampling(
        cls, config: Config, backbone: Backbone, device: torch.device, adapter: bool = False
    ) -> "Policy":
        """A policy with a single transformer in the compute dtype.

        `adapter` adds the LoRA adapter of a run.
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

    def encode(self, texts: list[str]) -> Conditioning:
        """Conditioning of `texts` on the policy's device, one row each."""
        if not self.unconditional:
            empty = self.backbone.encode([""])
            self.unconditional = {name: value.to(self.device) for name, value in empty.items()}
        return {name: value.to(self.device) for name, value in self.backbone.encode(texts).items()}

    # ------------------------------------------------------------------ velocities

    def velocity(
        self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of `model` with guidance.

        If the backbone embeds guidance, the scale is an input of the model. Otherwise a scale other
        than 1 uses true CFG: v_free + guidance (v - v_free), unless the backbone defines another
        formula. With compiled blocks the batch is padded to a size that is already compiled.
        """
        rows = next((rows for rows in self.batch_sizes if rows >= len(x)), len(x))
        if rows > len(x):
            index = torch.arange(rows, device=x.device).clamp(max=len(x) - 1)
            padded = self.velocity(model, x[index], sigma[index], take(cond, index), guidance)
            return padded[: len(x)]
        if self.backbone.embedded_guidance:
            scale = torch.full((len(x),), guidance, device=x.device)
            return self.backbone.velocity(model, x, sigma, {**cond, "guidance": scale})
        if guidance == 1:
            return self.backbone.velocity(model, x, sigma, cond)
        both = {
            name: torch.cat([value, self.unconditional[name].expand_as(value)])
            for name, value in cond.items()
        }
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        v, v_free = self.backbone.velocity(model, x, sigma, both).float().chunk(2)
        if isinstance(self.backbone, CustomGuidance):
            return self.backbone.guide(v, v_free, guidance)
        return v_free + guidance * (v - v_free)

    @torch.no_grad()
    def sample_velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float,
        model: nn.Module | None = None,
    ) -> Tensor:
        """v [B, *L] without gradient in the compute dtype, of the sampler or of another copy `model`."""
        model = model or self.sampler
        # Other copies are stored in the compute dtype.
        mixed = model is self.old or (self.lora and model is self.sampler)
        enabled = mixed and self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            return self.velocity(model, x.to(self.dtype), sigma, cond, guidance)

    def rollout_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of the policy that samples rollouts: the old policy if there is one, or the sampler."""
        sample = self.sample_velocity if self.old is None else self.old_velocity
        return sample(x, sigma, cond, guidance)

    def train_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] in float32 with gradient where grad mode is enabled."""
        with self._autocast():
            return self.velocity(self.model, x, sigma, cond, guidance).float()

    @torch.no_grad()
    def reference_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of the model before training.

        Raises:
            RuntimeError: a full fine-tune without KL has no reference.
        """
        with self._autocast():
            if self.lora:
                with self._adapter_disabled():
                    return self.velocity(self.model, x, sigma, cond, guidance).float()
            if self.reference is None:
                raise RuntimeError("a full fine-tune has a reference only if kl_weight > 0")
            return self.velocity(self.reference, x, sigma, cond, guidance).float()

    @torch.no_grad()
    def old_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] of the old policy.

        Raises:
            RuntimeError: there is no old policy.
        """
        if self.old is None:
            raise RuntimeError("this policy has no old copy")
        with self._autocast():
            return self.velocity(self.old, x, sigma, cond, guidance).float()

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    @contextlib.contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        self.model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.enable_adapters()  # type: ignore[operator]

    # ------------------------------------------------------------------ parameters

    def parameters_of(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of a copy that are trained in the model, in the same order."""
        of_copy = dict(module.named_parameters())
        return [of_copy[name] for name in self.parameters]

    def after_update(self) -> None:
        """Update the EMA and the sampler after an optimizer step."""
        self.updates += 1
        if self.ema is not None and self.updates % self.ema_every == 0:
            self.ema.step(self.parameters.values())
        self.refresh()

    @torch.no_grad()
    def move_old(self, decay: float) -> None:
        """Move the old policy toward the trained one. It keeps the share `decay` of itself."""
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

        The trained ones are then restored exactly.
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

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters, EMA and old policy by name, for a checkpoint.

        The tensors themselves, not copies.
        """
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
        ema_steps = self.ema.optimization_step if self.ema is not None else 0
        return {"updates": self.updates, "ema_steps": ema_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counters. Call it after `tensors` were read."""
        self.updates = state["updates"]
        if self.ema is not None:
            self.ema.optimization_step = state["ema_steps"]
        self.refresh()

    @torch.no_grad()
    def load_for_sampling(self, path: Path) -> None:
        """Load the EMA parameters of checkpoint `path`, or the trained ones if the run has no EMA.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        state = checkpoint.load(path)
        kind = "ema" if state["config"]["training"]["ema_decay"] else "weights"
        parameters = self.parameters or dict(self.model.named_parameters())
        names = list(parameters)
        for first in range(0, len(names), _READ_TOGETHER):  # float32 buffers of a few tensors
            chunk = names[first : first + _READ_TOGETHER]
            stored = {f"{kind}.{name}": torch.empty(parameters[name].shape) for name in chunk}
            checkpoint.read(path, stored)
            for name in chunk:
                parameters[name].copy_(stored[f"{kind}.{name}"])

    def compile_blocks(self, module: nn.Module) -> None:
        """Compile the repeated layers of `module`, if runtime.compile is set."""
        if self.compile_backend is None:
            return
        torch._dynamo.config.recompile_limit = (
            64  # kinds of blocks x sizes x with and without gradient
        )
        for name in self.copies.block_names:
            module.get_submodule(name).compile(backend=self.compile_backend, dynamic=False)


def _compiled_sizes(config: Config) -> list[int]:
    """Batch sizes that are compiled. Empty without compilation."""
    if config.runtime.compile is None:
        return []
    return sorted({config.sampling.batch_size, config.micro_batch_size})

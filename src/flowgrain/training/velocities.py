"""The velocities of a transformer and its copies.

Shapes: B rows, *L latent.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowgrain.config.schema import Config
from flowgrain.models import Backbone, Conditioning, CustomGuidance, check_results, take
from flowgrain.settings import SettingsError
from flowgrain.training.copies import Copies
from flowgrain.training.load import compute_dtype

# Kinds of blocks, times batch sizes, times with and without gradient.
_COMPILED_VARIANTS = 64


class Velocities:
    """Velocities of a transformer and its copies, with guidance and in the compute dtype.

    Attributes:
        backbone: encodes prompts and evaluates a transformer.
        copies: the transformer and its copies.
        model: the trained transformer.
        sampler: the transformer that samples, which may be `model`.
        reference: the transformer before training, if a full fine-tune needs it.
        old: the slowly moving policy of a forward-process method, which may sample the rollouts.
        lora: whether the model has a LoRA adapter.
    """

    def __init__(
        self, config: Config, backbone: Backbone, copies: Copies, device: torch.device
    ) -> None:
        self.backbone, self.copies, self.device = backbone, copies, device
        self.model, self.sampler = copies.model, copies.sampler
        self.reference, self.old = copies.reference, copies.old
        self.dtype = compute_dtype(config.runtime.dtype, device)
        self.lora = config.lora.rank > 0
        self.compile_backend = config.runtime.compile
        self.batch_sizes = _compiled_sizes(config)
        for module in copies.distinct():
            self.compile_blocks(module)
        self.unconditional: Conditioning = {}

    def check_backbone(self) -> None:
        """Check what the methods of a backbone from outside of this package return.

        Raises:
            SettingsError: a method raises an error, or returns another type or shape.
        """
        try:
            check_results(
                self.backbone,
                self.device,
                lambda x, sigma, cond: self.sample_velocity(x, sigma, cond, 1.0),
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def encode(self, texts: list[str]) -> Conditioning:
        """Conditioning of `texts` on the policy's device, one row per text."""
        if not self.unconditional:
            empty = self.backbone.encode([""])
            self.unconditional = {name: value.to(self.device) for name, value in empty.items()}
        return {name: value.to(self.device) for name, value in self.backbone.encode(texts).items()}

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
        """v [B, *L] of `model`, by default the sampler, in the compute dtype without gradient."""
        model = model or self.sampler
        # Other copies are stored in the compute dtype.
        mixed = model is self.old or (self.lora and model is self.sampler)
        enabled = mixed and self.dtype != torch.float32
        with self._autocast(enabled):
            return self.velocity(model, x.to(self.dtype), sigma, cond, guidance)

    def rollout_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of the policy that samples rollouts: the old policy or the sampler."""
        sample = self.old_velocity if self.copies.old_samples else self.sample_velocity
        return sample(x, sigma, cond, guidance)

    def train_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] in float32, with gradient if grad mode is enabled."""
        with self._autocast():
            return self.velocity(self.model, x, sigma, cond, guidance).float()

    @torch.no_grad()
    def reference_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of the model before training.

        Raises:
            RuntimeError: this is a full fine-tune with a method that needs no reference.
        """
        with self._autocast():
            if self.lora:
                with self._adapter_disabled():
                    return self.velocity(self.model, x, sigma, cond, guidance).float()
            if self.reference is None:
                raise RuntimeError("this method needs no reference, so there is no copy of it")
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

    def compile_blocks(self, module: nn.Module) -> None:
        """Compile the repeated blocks of `module`, if runtime.compile is set."""
        if self.compile_backend is None:
            return
        torch._dynamo.config.recompile_limit = _COMPILED_VARIANTS
        for name in self.copies.block_names:
            module.get_submodule(name).compile(backend=self.compile_backend, dynamic=False)

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        # The cache would keep a copy of all parameters in the compute dtype until the end.
        return torch.autocast(
            self.device.type,
            dtype=self.dtype,
            enabled=enabled and self.dtype != torch.float32,
            cache_enabled=False,
        )

    @contextlib.contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        self.model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.enable_adapters()  # type: ignore[operator]


def _compiled_sizes(config: Config) -> list[int]:
    """Batch sizes that are compiled. Empty without compilation."""
    if config.runtime.compile is None:
        return []
    return sorted({config.sampling.batch_size, config.micro_batch_size})

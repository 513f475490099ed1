"""The memory of a run on each GPU, by part, and the size of its checkpoints."""

from dataclasses import dataclass

import torch

from flowgrain.config.schema import Config
from flowgrain.distributed.world import GPUS_PER_MACHINE
from flowgrain.methods import DifferentiableReward, ForwardProcess, Repair, RewardGradient
from flowgrain.training.activations import decoder_activations
from flowgrain.training.sizes import ModelSize

USABLE_SHARE = 0.9
"""Share of the memory that the parts may take. The rest is for activations."""


@dataclass(frozen=True)
class Layout:
    """How a run divides its parameters among GPUs.

    Attributes:
        lora: only an adapter is trained.
        replica: every GPU samples with a full copy, separate from the trained parameters.
        shards: number of GPUs among which trained parameters are divided. 1: not divided.
    """

    lora: bool
    replica: bool
    shards: int

    @classmethod
    def of(cls, config: Config, gpus: int) -> "Layout":
        """The layout on `gpus` GPUs. runtime.rollout_weights=auto counts as replica."""
        lora = config.lora.rank > 0
        replica = gpus > 1 and config.runtime.rollout_weights != "sharded"
        sharded = gpus > 1 and not (lora and replica)
        return cls(lora, replica, min(gpus, GPUS_PER_MACHINE) if sharded else 1)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds on each GPU, by part, without text encoders.

    Activations are left out, except those of a decoder with gradient.
    """

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts, in bytes."""
        return sum(self.parts.values())

    def fits(self, available: float) -> bool:
        """Whether the parts leave 10% of `available` bytes for activations."""
        return self.total < USABLE_SHARE * available


def memory(config: Config, size: ModelSize, dtype: torch.dtype, gpus: int = 1) -> Memory:
    """The memory of a training run on each GPU. It follows `training.copies`.

    Args:
        config: configuration of the run.
        size: size of its model.
        dtype: compute dtype, see runtime.dtype.
        gpus: number of GPUs.

    Returns:
        Bytes by part. Parts that the run does not have are left out.
    """
    layout, width, shards = Layout.of(config, gpus), dtype.itemsize, Layout.of(config, gpus).shards
    trained = trained_parameters(config, size)
    # Trained parameters, gradients and optimizer states are float32.
    frozen = width * size.transformer if layout.lora else 0
    weights = (frozen + 4 * trained) / shards
    keeps_reference = config.method.needs_reference and not layout.lora
    keeps_old = _keeps_old(config)
    shares_frozen = layout.lora and shards == 1
    often = config.runtime.gradient_reduction == "micro_batch"
    parts = {
        "weights": weights,
        # By default not sharded until the last micro-batch of an update.
        "gradients": 4.0 * trained / (shards if often else 1),
        "AdamW": 8.0 * trained / shards,
        "EMA": 4.0 * trained / shards if config.training.ema_decay else 0.0,
        "reference": weights if keeps_reference else 0.0,
        "old policy": (4.0 * trained if shares_frozen else weights) if keeps_old else 0.0,
        "sampling copy": _sampling_copy(size, dtype, layout),
        "quantized copy": _quantized_copy(config, size, width),
        "VAE": _vae_width(config) * size.vae,
        "decoder activations": _decoder_activations(config),
        "latents": _latents(config, size, gpus),
    }
    return Memory({name: value for name, value in parts.items() if value})


def trained_parameters(config: Config, size: ModelSize) -> int:
    """Number of trained parameters: those of the adapter, or all of the transformer."""
    return config.lora.rank * size.adapter if config.lora.rank else size.transformer


def checkpoint_bytes(config: Config, size: ModelSize) -> int:
    """Bytes of all checkpoints that a run keeps on the disk at once."""
    trained = trained_parameters(config, size)
    keeps_old = _keeps_old(config)
    copies = 3 + bool(config.training.ema_decay) + keeps_old  # parameters and two moments
    copies += config.rollout.max_staleness  # the parameters that sample the next step
    training = config.training
    written = training.max_steps // training.checkpoint_every if training.checkpoint_every else 0
    # the best, and one that is being written
    count = min(training.keep_checkpoints, written + 1) + 2
    return 4 * trained * copies * count


def _keeps_old(config: Config) -> bool:
    """Whether the run has a slowly moving policy."""
    return isinstance(config.method, ForwardProcess) and config.method.needs_old


def _sampling_copy(size: ModelSize, dtype: torch.dtype, layout: Layout) -> float:
    """Bytes of the copy that samples.

    A LoRA, and a float32 run on one GPU, sample with the trained model itself.
    """
    if layout.lora or (dtype == torch.float32 and not layout.replica):
        return 0.0
    return dtype.itemsize * size.transformer / (1 if layout.replica else layout.shards)


def _quantized_copy(config: Config, size: ModelSize, width: int) -> float:
    """Bytes of the copies for tails: 1 per quantized parameter, `width` per other parameter.

    The tails and the candidates have a copy each, unless their settings are equal.
    """
    sampling, explore = config.sampling, config.sampling.explore
    exact, cheap = ((part.tail_weights, part.tail_cache) for part in (sampling, explore))
    copies = int(exact[0] != "same")
    copies += explore.candidates > 0 and cheap[0] != "same" and cheap != exact
    other = size.transformer - size.quantizable + config.lora.rank * size.adapter
    return copies * float(size.quantizable + width * other)


def _vae_width(config: Config) -> float:
    """Bytes of a number in the VAE."""
    return 2.0 if config.model.vae_dtype == "bfloat16" else 4.0


def _decoder_activations(config: Config) -> float:
    """Bytes that the decoder keeps for the gradient of a reward.

    The activations of the transformer and of the rewards are not counted.
    """
    if not isinstance(config.method, DifferentiableReward):
        return 0.0
    images = config.method.decode_batch_size
    if isinstance(config.method, RewardGradient):  # the images of a micro-batch
        images = min(images, config.micro_batch_size)
    return _vae_width(config) * images * decoder_activations(config.model)


def _latents(config: Config, size: ModelSize, gpus: int) -> float:
    """Bytes of the float32 latents that a rollout keeps.

    These are leaves, trained edges, their parents, and kept rows. A repair moves every leaf. The
    ranks of a context group have the same prompts.
    """
    tree = config.tree()
    kept = len(tree.leaves) + len(tree.edges) + len(tree.trained_parents) + int(tree.kept.sum())
    if isinstance(config.method, Repair):
        kept += len(tree.leaves)
    groups = max(gpus // config.runtime.context_parallel, 1)
    prompts = -(-config.training.prompts_per_step // groups)
    return 4.0 * size.latent * prompts * kept

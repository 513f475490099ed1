"""The copies of a transformer that training needs.

model: the trained transformer, with float32 master parameters, or frozen and with a LoRA adapter.
sampler: samples rollouts. The model itself, or a copy in the compute dtype, or a copy with the
    complete parameters on each rank.
reference: the model before training, for the KL of a full fine-tune. With LoRA, the model with its
    adapter disabled is the reference.
old: the slowly moving policy of a forward-process method, which may sample the rollouts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from flowgrain.config.schema import Config
from flowgrain.distributed import World, local_world_size
from flowgrain.distributed.sharding import shard
from flowgrain.methods import ForwardProcess
from flowgrain.models import Backbone
from flowgrain.settings import SettingsError, did_you_mean


@dataclass
class Copies:
    """The transformer and its copies. See the module's docstring.

    Attributes:
        model: the trained transformer.
        sampler: the transformer that samples.
        reference: the transformer before training, or None.
        old: the old policy, or None.
        block_names: names of the repeated blocks.
        sharded: whether the parameters of the model are sharded over ranks.
        sampler_sharded: whether the transformer that samples rollouts is sharded.
        old_samples: whether the old policy samples rollouts.
    """

    model: nn.Module
    sampler: nn.Module
    reference: nn.Module | None
    old: nn.Module | None
    block_names: list[str]
    sharded: bool = False
    sampler_sharded: bool = False
    old_samples: bool = False

    def distinct(self) -> list[nn.Module]:
        """Every module once."""
        modules = (self.model, self.reference, self.sampler, self.old)
        return list({id(module): module for module in modules if module is not None}.values())


def make_copies(
    config: Config, backbone: Backbone, device: torch.device, dtype: torch.dtype, world: World
) -> Copies:
    """The trained model and the copies that `config` needs, sharded and on `device`.

    Copies are made before the model is sharded. They stay on the CPU until then, and FSDP moves
    them to `device` block by block.
    """
    lora, several = config.lora.rank > 0, world.size > 1
    model = trained_model(config, backbone, dtype)
    block_names = names_of_blocks(model, backbone.blocks)
    replica = several and holds_replica(config, model, dtype, device, world)
    sharded = several and not (lora and replica)
    reference = reference_copy(model) if config.method.needs_reference and not lora else None
    own_sampler = not lora and (dtype != torch.float32 or replica)
    sampler = sampler_copy(model, dtype) if own_sampler else model
    method = config.method
    keeps_old = isinstance(method, ForwardProcess) and method.needs_old
    samples_old = isinstance(method, ForwardProcess) and method.old_samples
    old = old_copy(model, share_frozen=not sharded) if keeps_old else None
    copies = Copies(model, sampler, reference, old, block_names, sharded, old_samples=samples_old)
    copies.sampler_sharded = sharded if samples_old else several and not replica
    if sharded:
        for module in (model, reference, old, None if replica or not own_sampler else sampler):
            if module is not None:
                shard(module, [module.get_submodule(name) for name in block_names], world)
    backbone.to(device)
    for module in copies.distinct():
        module.to(device)
    return copies


def trained_model(config: Config, backbone: Backbone, dtype: torch.dtype) -> nn.Module:
    """The backbone's transformer, prepared for training.

    It has float32 master parameters, or is frozen with a LoRA adapter. It stays in eval mode,
    because with dropout the ratio would not be 1 before the first update.
    """
    lora = config.lora.rank > 0
    model = backbone.transformer.to(dtype if lora else torch.float32).eval().requires_grad_(False)
    if lora:
        add_adapter(config, backbone)
    else:
        model.requires_grad_(True)
    return model


def add_adapter(config: Config, backbone: Backbone) -> None:
    """Add a LoRA adapter with float32 parameters to the backbone's transformer.

    Raises:
        SettingsError: the backbone does not support LoRA, or lora.target_modules names no layer.
    """
    if not backbone.lora_targets:
        raise SettingsError(
            f"lora.rank={config.lora.rank}: this backbone does not support LoRA. Use lora.rank=0."
        )
    check_target_modules(config, backbone)
    from peft import LoraConfig  # takes seconds to import

    adapter = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha or 2 * config.lora.rank,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=list(config.lora.target_modules or backbone.lora_targets),
    )
    transformer = backbone.transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        transformer.add_adapter(adapter)  # type: ignore[operator]
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_target_modules(config: Config, backbone: Backbone) -> None:
    """Check that every entry of lora.target_modules names a linear layer of the transformer.

    Raises:
        SettingsError: an entry names none.
    """
    layers = [n for n, m in backbone.transformer.named_modules() if isinstance(m, nn.Linear)]
    for target in config.lora.target_modules or ():
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            ends = {".".join(layer.split(".")[-2:]) for layer in layers}
            raise SettingsError(
                f"lora.target_modules={target}: no linear layer of the model has a name with this "
                f"end. {did_you_mean(target, sorted(ends))} Default: {backbone.lora_targets}."
            )


def reference_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of the model before training."""
    return copy.deepcopy(model).requires_grad_(False)


def sampler_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype` that only samples."""
    return copy.deepcopy(model).requires_grad_(False).to(dtype)


def old_copy(model: nn.Module, share_frozen: bool) -> nn.Module:
    """A copy for the old policy. `share_frozen`: share the frozen parameters with `model`."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad} if share_frozen else {}
    return copy.deepcopy(model, frozen).requires_grad_(False)


def names_of_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Names of the repeated blocks inside `model`."""
    return [name for name, module in model.named_modules() if any(module is b for b in blocks)]


def holds_replica(
    config: Config, model: nn.Module, dtype: torch.dtype, device: torch.device, world: World
) -> bool:
    """Whether every rank samples with a full copy.

    With runtime.rollout_weights=auto, the copy must take less than 40% of the free memory of
    every rank.
    """
    if config.runtime.rollout_weights != "auto":
        return config.runtime.rollout_weights == "replica"
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available // local_world_size()
    return all(world.gather(size < 0.4 * free))

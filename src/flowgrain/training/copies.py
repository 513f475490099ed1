"""The copies of a transformer that training needs.

model: the trained transformer, with float32 master parameters, or frozen and with a LoRA adapter.
sampler: samples rollouts. The model itself, or a copy in the compute dtype, or a copy with the
    complete parameters on each rank.
reference: the model before training, for the KL of a full fine-tune. With LoRA, the model with its
    adapter disabled is the reference.
old: the slowly moving policy of a forward-process method, which may sample the rollouts.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from flowgrain.config.schema import Config
from flowgrain.distributed import World, local_world_size
from flowgrain.distributed.sharding import shard
from flowgrain.methods import ForwardProcess
from flowgrain.models import Backbone, EmptyBackbone
from flowgrain.models.weights import WeightFiles, fill
from flowgrain.settings import SettingsError, did_you_mean

REPLICA_SHARE = 0.4
"""runtime.rollout_weights=auto takes a replica below this share of the free memory."""


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

    Copies are made before the model is sharded. If the transformer of the backbone is empty, copies
    and shards are also empty, and are then filled from the files tensor by tensor. Otherwise they
    stay on the CPU until they are sharded, and FSDP moves them to `device` block by block.
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
    fill_copies(backbone, copies, lora, device)
    backbone.to(device)
    for module in copies.distinct():
        module.to(device)
    return copies


def fill_copies(backbone: Backbone, copies: Copies, lora: bool, device: torch.device) -> None:
    """Fill the model and its copies, if the transformer of the backbone is empty.

    On a CPU, frozen parameters that are never modified are views of the files: with LoRA those of
    the model and of the old policy, and the reference of a full fine-tune.
    """
    files = files_of(backbone)
    if files is not None and isinstance(backbone, EmptyBackbone):
        models = [(module, lora or module is copies.reference) for module in copies.distinct()]
        fill(models, files, device)
        backbone.weights = None  # closes the files that no tensor is a view of


def files_of(backbone: Backbone) -> WeightFiles | None:
    """The files of the weights, if the transformer of the backbone is empty."""
    return backbone.weights if isinstance(backbone, EmptyBackbone) else None


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
    on_cpu = _on_cpu(transformer) if files_of(backbone) is not None else contextlib.nullcontext()
    with on_cpu, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        transformer.add_adapter(adapter)  # type: ignore[operator]
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Replace empty parameters by zeros without memory on the CPU, inside this context.

    peft moves a new adapter to the device of its layer. On the meta device it would be lost.
    """
    empty = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device.type == "meta"
    ]
    for module, name, parameter in empty:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in empty:
            module.register_parameter(name, parameter)


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
    """A copy in `dtype` that only samples. It never exists in another dtype."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    converted: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            value = tensor.detach().to(dtype, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            converted[id(tensor)] = nn.Parameter(value) if is_parameter else value
    return copy.deepcopy(model, converted).requires_grad_(False)


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

    With runtime.rollout_weights=auto, the copy must take less than `REPLICA_SHARE` of the free
    memory of every rank.
    """
    if config.runtime.rollout_weights != "auto":
        return config.runtime.rollout_weights == "replica"
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available // local_world_size()
    return all(world.gather(size < REPLICA_SHARE * free))

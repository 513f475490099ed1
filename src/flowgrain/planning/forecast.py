"""The expected time, transfers and memory of a training step on several GPUs.

The forecast is computed from forward passes, FLOPs, bytes and link speeds. It is a
calculation, not a measurement. The documentation compares it with measurements and lists the costs
that it leaves out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flowgrain.config.schema import Config
from flowgrain.methods.cost import num_updates
from flowgrain.planning.plan import prompt_cost
from flowgrain.settings import SettingsError, did_you_mean
from flowgrain.training.load import compute_dtype
from flowgrain.training.memory import GPUS_PER_MACHINE, Layout, Memory, memory
from flowgrain.training.sizes import ModelSize, embeds_guidance, forward_flops, model_size


@dataclass(frozen=True)
class Gpu:
    """A GPU, according to its data sheet.

    Attributes:
        flops: bfloat16 FLOP/s without sparsity.
        memory: bytes.
        near: bytes/s to another GPU of the machine, in one direction.
        far: bytes/s to a GPU of another machine, in one direction.
    """

    flops: float
    memory: float
    near: float
    far: float


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
}
"""Known GPUs by name."""

UTILIZATION = 0.5
"""Share of a GPU's FLOP/s that a transformer is assumed to reach."""


@dataclass(frozen=True)
class Forecast:
    """The forecast for one of the GPUs.

    Attributes:
        seconds: seconds per training step, by part.
        moved: bytes per training step over the links, by part.
        held: bytes of memory by part, see `memory`.
        flops_of_pass: FLOPs of one forward pass.
    """

    seconds: dict[str, float]
    moved: dict[str, float]
    held: dict[str, float]
    flops_of_pass: float

    @property
    def total(self) -> float:
        """Seconds per training step, without text encoders, decoding and rewards."""
        return sum(self.seconds.values())


def forecast(config: Config, gpus: int, gpu: str, utilization: float = UTILIZATION) -> Forecast:
    """The forecast of a training step of `config`.

    Args:
        config: configuration of the run.
        gpus: number of GPUs.
        gpu: name of the GPU, see `GPUS`.
        utilization: share of the GPU's FLOP/s that is reached.

    Raises:
        SettingsError: the GPU or the model is not known, or the run uses context parallelism.
    """
    if config.runtime.context_parallel > 1:
        raise SettingsError(
            f"runtime.context_parallel={config.runtime.context_parallel}: the forecast cannot "
            "compute this traffic. Use runtime.context_parallel=1."
        )
    if gpu not in GPUS:
        raise SettingsError(f"--gpu {gpu}: there is no such GPU. {did_you_mean(gpu, GPUS)}")
    flops = forward_flops(config.model)
    size = model_size(config.model, config.lora.target_modules)
    if size is None:
        raise SettingsError(f"model.path={config.model.path}: the size of this model is not known.")
    passes = _passes(config, gpus)
    moved = _moved(config, size, passes, gpus)
    link, speed = GPUS[gpu], utilization * GPUS[gpu].flops
    forwards_of_update = 4 if config.model.gradient_checkpointing else 3
    update_passes = forwards_of_update * passes.gradient + passes.frozen
    rest = moved["refresh of the replica"] + moved["gradients"]
    seconds = {
        "sampling": max(passes.sampling * flops / speed, moved["rollout"] / link.near),
        "update": max(update_passes * flops / speed, moved["weights of the update"] / link.near),
        "links": rest / link.near + moved["gradients between machines"] / link.far,
    }
    dtype = compute_dtype(config.runtime.dtype, torch.device("cuda"))
    held = memory(config, size, dtype, gpus).parts
    return Forecast(seconds, {name: size for name, size in moved.items() if size}, held, flops)


@dataclass(frozen=True)
class _Passes:
    """Forward passes of one GPU per step.

    Attributes:
        sampling: rows that sample.
        gradient: rows with gradient.
        frozen: rows of the update without gradient.
        rows_per_row: 2 with true CFG, which doubles all of these numbers; otherwise 1.
    """

    sampling: int
    gradient: int
    frozen: float
    rows_per_row: int


def _passes(config: Config, gpus: int) -> _Passes:
    cost = prompt_cost(config)
    prompts = -(-config.training.prompts_per_step // gpus)  # all GPUs get the same number
    guided = config.sampling.guidance_scale != 1 and not embeds_guidance(config.model)
    rows = 2 if guided else 1
    return _Passes(
        rows * prompts * cost.forward_passes,
        rows * prompts * cost.train_forward_passes,
        rows * prompts * cost.frozen_forward_passes,
        rows,
    )


def _moved(config: Config, size: ModelSize, passes: _Passes, gpus: int) -> dict[str, float]:
    """Bytes that one GPU receives per step, by part.

    Parameters are sharded within a machine. Between machines only gradients are exchanged.
    """
    layout = Layout.of(config, gpus)
    width = compute_dtype(config.runtime.dtype, torch.device("cuda")).itemsize
    parameters = size.transformer
    trained = config.lora.rank * size.adapter if layout.lora else parameters
    calls = math.ceil(passes.sampling / passes.rows_per_row / config.sampling.batch_size)
    micro_batches = passes.gradient / passes.rows_per_row / config.micro_batch_size
    updates = num_updates(config.method, config.tree(), config.training.prompts_per_step)
    received = (layout.shards - 1) / layout.shards  # share of an all-gather or reduce-scatter
    machines = -(-gpus // GPUS_PER_MACHINE)
    sharded_rollout = not layout.replica
    refreshed = layout.replica and not layout.lora
    return {
        "rollout": width * parameters * received * calls if sharded_rollout else 0.0,
        "refresh of the replica": 4.0 * parameters * received * updates if refreshed else 0.0,
        "weights of the update": 2 * 4.0 * parameters * received * micro_batches,
        "gradients": 4.0 * trained * received * updates,
        "gradients between machines": 2
        * 4.0
        * trained
        / layout.shards
        * (machines - 1)
        / machines
        * updates,
    }


def forecast_rows(found: Forecast, gpus: int, gpu: str) -> list[tuple[str, str]]:
    """A forecast as lines of text: a name and a value each."""
    held = Memory(found.held)
    available = GPUS[gpu].memory
    seconds = [(f"seconds per step, {part}", f"{s:,.1f}") for part, s in found.seconds.items()]
    moved = [(f"moved per step, {part}", f"{b / 1e9:,.1f} GB") for part, b in found.moved.items()]
    parts = [(f"memory, {part}", f"{b / 1e9:,.1f} GB") for part, b in held.parts.items()]
    fits = "without activations" if held.fits(available) else "does not fit"
    return [
        ("one forward pass", f"{found.flops_of_pass / 1e12:.1f} TFLOP"),
        *seconds,
        (
            f"seconds per step on {gpus} x {gpu}",
            f"{found.total:,.1f}, without text encoders, decoding and rewards",
        ),
        *moved,
        *parts,
        ("memory in total", f"{held.total / 1e9:,.1f} of {available / 1e9:,.0f} GB, {fits}"),
    ]

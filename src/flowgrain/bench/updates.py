"""Speed of training: rows per second of micro-batches with gradient, and of the optimizer."""

from functools import partial
from typing import Any

import torch

from flowgrain.bench.acceleration import inputs
from flowgrain.bench.record import Skipped, StepRecord, free_memory
from flowgrain.bench.sampling import compile_policy, row_flops
from flowgrain.bench.setup import Setup
from flowgrain.bench.sizes import ModelSizes
from flowgrain.bench.timing import timed, utilization
from flowgrain.config import Config
from flowgrain.distributed import SINGLE
from flowgrain.training.memory import memory
from flowgrain.training.optimizer import PolicyOptimizer
from flowgrain.training.policy import Policy
from flowgrain.training.sizes import model_size


def measure_training(setup: Setup, record: StepRecord, kind: str) -> None:
    """Measure micro-batches of model `kind`: LoRA, compiled LoRA, and a full fine-tune."""
    sizes = setup.sizes.kinds[kind]
    _measure_lora(setup, record, sizes)
    free_memory()  # a backbone is part of a reference cycle
    _measure_full(setup, record, sizes)


def _measure_lora(setup: Setup, record: StepRecord, sizes: ModelSizes) -> None:
    config = setup.config(sizes)
    policy = setup.policy(sizes, config)
    optimizer = PolicyOptimizer(policy, config, SINGLE)

    def measure(rows: int, sweep: str) -> None:
        work = partial(micro_batch, setup, policy, config, rows)
        record.run(f"training, {sizes.name}, {sweep}, {rows} rows", work, sweep=sweep)

    for rows in sizes.training:
        measure(rows, "LoRA")
    record.run(f"optimizer, {sizes.name}, LoRA", partial(update, setup, optimizer, policy))
    set_checkpointing(policy, False)
    for rows in sizes.plain:
        measure(rows, "LoRA without checkpointing")
    set_checkpointing(policy, True)
    compile_policy(setup, policy)
    measure(sizes.training[-1 if setup.tiny else 0], "compiled LoRA")


def _measure_full(setup: Setup, record: StepRecord, sizes: ModelSizes) -> None:
    """Measure a full fine-tune, if its parameters, gradients and optimizer states fit."""
    config = setup.config(sizes, "lora.rank=0")
    built: list[Policy] = []

    def prepare() -> dict[str, Any]:
        values = check_fits(setup, config)
        built.append(setup.policy(sizes, config))
        return values

    name = f"{sizes.name}, full fine-tune"
    record.run(f"memory, {name}", prepare)
    if not built:
        return
    policy = built[0]
    for rows in sizes.full:
        work = partial(micro_batch, setup, policy, config, rows)
        record.run(f"training, {name}, {rows} rows", work, sweep="full")
    optimizer = PolicyOptimizer(policy, config, SINGLE)
    record.run(f"optimizer, {name}", partial(update, setup, optimizer, policy))


def check_fits(setup: Setup, config: Config) -> dict[str, Any]:
    """The expected memory of the run in 10^9 bytes, without activations.

    Raises:
        Skipped: it does not fit on the GPU.
    """
    size = model_size(config.model, config.lora.target_modules)
    if setup.device.type != "cuda" or size is None:
        return {"expected_gb": None}
    expected = memory(config, size, torch.bfloat16)
    available = torch.cuda.get_device_properties(setup.device).total_memory
    if not expected.fits(available):
        raise Skipped(
            f"needs {expected.total / 1e9:.0f} GB without activations, and the GPU has "
            f"{available / 1e9:.0f} GB"
        )
    return {"expected_gb": expected.total / 1e9}


def micro_batch(setup: Setup, policy: Policy, config: Config, rows: int) -> dict[str, Any]:
    """Rows per second and utilization of a forward and a backward pass of `rows` rows.

    The FLOPs of the model count, without those that gradient checkpointing repeats: 3 forward
    passes, or 2 with a LoRA, because frozen weights need no gradient.
    """
    guidance = config.sampling.guidance_scale
    x, sigma, cond = inputs(policy, rows)

    def work() -> None:
        policy.train_velocity(x, sigma, cond, guidance).square().mean().backward()  # type: ignore[no-untyped-call]

    try:
        values = timed(work, setup.device, setup.sizes.repeats)
    finally:  # also if the memory was not sufficient
        policy.model.zero_grad(set_to_none=True)
    result = {
        "resolution": config.model.height,
        "batch": rows,
        **values,
        "rows_per_second": rows / values["seconds"],
    }
    if setup.tiny:
        return result
    flops = (2 if policy.lora else 3) * rows * row_flops(config)
    return {**result, **utilization(flops, values["seconds"], setup.device)}


def update(setup: Setup, optimizer: PolicyOptimizer, policy: Policy) -> dict[str, Any]:
    """Seconds of an optimizer update: clipping, AdamW and the refresh of copies."""
    loss = torch.zeros(1, device=setup.device)

    def work() -> None:
        for parameter in policy.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step([loss])

    return timed(work, setup.device, setup.sizes.repeats)


def set_checkpointing(policy: Policy, enabled: bool) -> None:
    """Switch gradient checkpointing of the transformer on or off."""
    model: Any = policy.model
    if enabled:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()

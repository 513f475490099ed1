"""Speed of sampling: rows per second by batch size, eager and with compiled blocks.

A row is one evaluation of the policy's velocity. With true CFG it is two rows of the transformer.
"""

from functools import partial
from typing import Any

from flowgrain.bench.acceleration import inputs
from flowgrain.bench.record import StepRecord
from flowgrain.bench.setup import Setup
from flowgrain.bench.timing import timed, utilization
from flowgrain.config import Config
from flowgrain.training.policy import Policy
from flowgrain.training.sizes import embeds_guidance, forward_flops


def measure_sampling(setup: Setup, record: StepRecord, kind: str) -> None:
    """Measure the model calls of a rollout of model `kind` for every batch size."""
    sizes = setup.sizes.kinds[kind]
    config = setup.config(sizes)
    policy = setup.policy(sizes, config)
    for rows in sizes.sampling:
        work = partial(sampling, setup, policy, config, rows)
        record.run(f"sampling, {sizes.name}, eager, {rows} rows", work, sweep="eager")
    compile_policy(setup, policy)
    for rows in sizes.compiled:
        work = partial(sampling, setup, policy, config, rows)
        record.run(f"sampling, {sizes.name}, compiled, {rows} rows", work, sweep="compiled")


def compile_policy(setup: Setup, policy: Policy) -> None:
    """Compile the blocks of an existing policy. Every batch size is compiled on its first call."""
    policy.compile_backend = setup.compiler
    policy.compile_blocks(policy.model)


def sampling(setup: Setup, policy: Policy, config: Config, rows: int) -> dict[str, Any]:
    """Rows per second, images per second and utilization of calls with `rows` rows."""
    guidance = config.sampling.guidance_scale
    x, sigma, cond = inputs(policy, rows)
    values = timed(
        lambda: policy.sample_velocity(x, sigma, cond, guidance),
        setup.device,
        setup.sizes.repeats,
    )
    rate = rows / values["seconds"]
    return {
        "resolution": config.model.height,
        "batch": rows,
        **values,
        "rows_per_second": rate,
        "images_per_second": rate / config.sampling.num_steps,
        "steps_per_image": config.sampling.num_steps,
        **_utilization(setup, config, rows, values["seconds"]),
    }


def _utilization(setup: Setup, config: Config, rows: int, seconds: float) -> dict[str, float]:
    """The utilization of `rows` forward passes. Empty for tiny models, whose FLOPs do not count."""
    if setup.tiny:
        return {}
    return utilization(rows * row_flops(config), seconds, setup.device)


def row_flops(config: Config) -> float:
    """FLOPs of a row: one forward pass of the transformer, or two with true CFG."""
    guided = config.sampling.guidance_scale != 1 and not embeds_guidance(config.model)
    return (2 if guided else 1) * forward_flops(config.model)

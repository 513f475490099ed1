"""Checks of faster kernels on tiny models: compiled blocks, and quantized weights for tails."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flowgrain.bench.numerics import gradient_of, relative_error
from flowgrain.bench.record import Skipped, StepRecord, within
from flowgrain.bench.setup import Setup, exact_float32
from flowgrain.bench.sizes import TINY, ModelSizes, bench_config
from flowgrain.models import take
from flowgrain.settings import SettingsError
from flowgrain.training.policy import Policy
from flowgrain.training.tails import Tails

COMPILED_LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}
"""Largest relative difference of velocity and gradient to eager blocks, by dtype."""
QUANTIZED_LIMITS = {"int8": 0.05, "float8": 0.15}
"""Largest relative difference of the velocity to exact weights, by kind of weights."""

Quantized = Literal["int8", "float8"]


def check_compile(setup: Setup, record: StepRecord) -> None:
    """Compare compiled blocks with eager blocks."""
    exact_float32()
    for sizes in TINY.kinds.values():
        for dtype in COMPILED_LIMITS:
            record.run(f"compiled, {sizes.name}, {dtype}", partial(compiled, setup, sizes, dtype))


def compiled(setup: Setup, sizes: ModelSizes, dtype: str) -> dict[str, Any]:
    """The larger difference of compiled blocks: of the velocity or of the gradient."""
    config = bench_config(
        sizes, setup.device_name, f"runtime.dtype={dtype}", "sampling.batch_size=4"
    )
    counters.clear()
    eager = setup.policy(sizes, config)
    reference = _velocity_and_gradient(eager)
    faster = setup.policy(sizes, config.with_changes({"runtime.compile": setup.compiler}))
    ours = _velocity_and_gradient(faster)
    graphs = int(counters["stats"]["unique_graphs"])
    if not graphs:
        raise RuntimeError("torch.compile captured no graph, so nothing was compared")
    errors = [relative_error(a, b) for a, b in zip(ours, reference, strict=True)]
    of = {
        "backend": setup.compiler,
        "graphs": graphs,
        "velocity_error": errors[0],
        "gradient_error": errors[1],
    }
    return within(max(errors), COMPILED_LIMITS[dtype], **of)


def check_tails(setup: Setup, record: StepRecord) -> None:
    """Compare quantized weights for tails with exact weights."""
    kinds: tuple[Quantized, ...] = ("int8", "float8")
    for sizes in TINY.kinds.values():
        for kind in kinds:
            record.run(f"{kind} tails, {sizes.name}", partial(quantized, setup, sizes, kind))


def quantized(setup: Setup, sizes: ModelSizes, kind: Quantized) -> dict[str, Any]:
    """The difference of the velocity of sampling.tail_weights=`kind`.

    Raises:
        Skipped: torchao is not installed, or the device has no such matrix products.
    """
    config = bench_config(sizes, setup.device_name)
    policy = setup.policy(sizes, config)
    sampling = config.sampling.model_copy(update={"tail_weights": kind})
    try:
        tails = Tails(policy, sampling)
    except SettingsError as error:
        raise Skipped(str(error)) from error
    x, sigma, cond = inputs(policy)
    exact = policy.sample_velocity(x, sigma, cond, 1.0)
    with tails.open() as velocity:
        ours = velocity(x, sigma, cond, 1.0, False)
    return within(relative_error(ours, exact), QUANTIZED_LIMITS[kind])


def inputs(policy: Policy, rows: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random states x [B, *L], noise levels [B] and conditioning of one prompt, on the device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *policy.backbone.latent_shape, generator=generator).to(policy.device)
    sigma = torch.linspace(1, 0.2, rows, device=policy.device)
    first = torch.zeros(rows, dtype=torch.long, device=policy.device)
    return x, sigma, take(policy.encode(["prompt 0"]), first)


def _velocity_and_gradient(policy: Policy) -> tuple[Tensor, Tensor]:
    x, sigma, cond = inputs(policy)
    v = policy.sample_velocity(x, sigma, cond, 1.0)
    loss = policy.train_velocity(x, sigma, cond, 1.0).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return v, gradient_of(policy.model)

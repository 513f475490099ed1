"""Noise grid of a pipeline's scheduler."""

import math
from collections.abc import Mapping
from typing import Any

from flowgrain.core.sde import Shift


def linear_mu(config: Mapping[str, Any], num_tokens: int) -> float:
    """Return mu of the dynamic shift, linear in the number of image tokens as in most pipelines.

    Args:
        config: config of a FlowMatchEulerDiscreteScheduler.
        num_tokens: number of image tokens.
    """
    # Imports transformers, which prints warnings unless `quiet_libraries` was called before.
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu: float = calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return mu


def scheduler_shift(config: Mapping[str, Any], mu: float) -> Shift:
    """Return the noise grid of a scheduler to which a pipeline gives linspace(1, 1 / T, T).

    Args:
        config: config of a FlowMatchEulerDiscreteScheduler.
        mu: parameter of the dynamic shift. Not used by a scheduler with a constant shift.
    """
    terminal = config.get("shift_terminal") or None
    if not config.get("use_dynamic_shifting", False):
        return Shift(float(config.get("shift", 1.0)), terminal)
    return Shift(mu if config.get("time_shift_type") == "linear" else math.exp(mu), terminal)

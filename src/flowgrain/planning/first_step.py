"""Check of the first training step before a large model is loaded, by rehearsing it."""

import dataclasses

import torch

from flowgrain.config.schema import Config
from flowgrain.planning.findings import Finding
from flowgrain.planning.gpus import GPUS
from flowgrain.planning.rehearse import RehearsalError, rehearse
from flowgrain.settings import SettingsError
from flowgrain.training.fit import in_bytes, machine_memory
from flowgrain.training.load import compute_dtype
from flowgrain.training.memory import USABLE_SHARE
from flowgrain.training.sizes import ModelSize

_LARGE = 0.01
"""A model that takes less than this share of the memory in float32 is not rehearsed."""


def check_first_step(
    config: Config, size: ModelSize, device: torch.device, gpus: int
) -> list[Finding]:
    """Whether the first step of `config` runs and fits. Empty for a small model.

    Args:
        config: configuration of the run.
        size: size of the model.
        device: compute device.
        gpus: number of processes of the run.
    """
    available = available_memory(device)
    if 4 * size.transformer < _LARGE * available:
        return []
    dtype = str(compute_dtype(config.runtime.dtype, device)).removeprefix("torch.")
    card = dataclasses.replace(GPUS["h100"], memory=available)
    try:
        found = rehearse(config.with_changes({"runtime.dtype": dtype}), gpus, card)
    except SettingsError as error:
        return [Finding("first step", True, f"Not rehearsed: {error}")]
    except RehearsalError as error:
        return [
            Finding("first step", False, f"The rehearsal fails: {error}. See `flowgrain rehearse`.")
        ]
    phase, peak = found.peak
    kinds = sorted(peak.kinds.items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{kind} {in_bytes(value)}" for kind, value in kinds)
    message = (
        f"Rehearsed in {found.seconds:.0f} s: {in_bytes(peak.total)} of {in_bytes(available)} in "
        f"the phase {phase!r} ({parts})."
    )
    if found.fits(available):
        return [Finding("first step", True, message)]
    fix = (
        f"More than {USABLE_SHARE:.0%} of the memory does not fit. The model was not loaded. See "
        "`flowgrain rehearse --search` for settings that fit."
    )
    return [Finding("first step", False, f"{message} {fix}")]


def available_memory(device: torch.device) -> float:
    """Bytes of memory of the device, or of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    return machine_memory()

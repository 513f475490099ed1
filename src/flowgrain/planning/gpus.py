"""GPUs for forecasts, according to their data sheets."""

from collections.abc import Mapping
from dataclasses import dataclass

from flowgrain.settings import SettingsError, did_you_mean


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

EAGER, COMPILED = 0.31, 0.47
"""Share of the bfloat16 FLOP/s of an H100 that forward passes of FLUX.1-dev reach: 28 steps at
1024 x 1024 in 6.7 s (eager) and 4.5 s (compiled), published in
https://docs.pytorch.org/devlogs/inductor/2026-05-11-torch-compile-and-diffusers/. Other models,
other GPUs and backward passes are assumed to reach the same share.
"""


def gpu_count(number: int) -> str:
    """A number of GPUs in words."""
    return "1 GPU" if number == 1 else f"{number} GPUs"


def gpu_named(name: str) -> Gpu:
    """The GPU `name`.

    Raises:
        SettingsError: it is not known.
    """
    if name not in GPUS:
        raise SettingsError(f"--gpu {name}: there is no such GPU. {did_you_mean(name, GPUS)}")
    return GPUS[name]

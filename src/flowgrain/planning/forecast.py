"""The expected time of a training step on several GPUs, from a rehearsal.

The forecast is a calculation, not a measurement: counted FLOPs and bytes, divided by the rates of
data sheets and by a published utilization.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowgrain.planning.gpus import COMPILED, EAGER, Gpu
from flowgrain.planning.rehearsal.step import FIRST, LATER, OPTIMIZER
from flowgrain.planning.rehearse import Rehearsal

_STAGES: Mapping[str, tuple[str, ...]] = {
    "text encoders": ("encode",),
    "sampling": ("sample",),
    "decoding": ("decode",),
    "update": (FIRST, LATER, OPTIMIZER),
}
"""Phases of a rehearsal by part of a step. Scoring is left out: rewards are stand-ins."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of a step on one of the GPUs.

    Attributes:
        seconds: seconds by part of the step, without rewards.
        moved: bytes received over links, by part.
    """

    seconds: dict[str, float]
    moved: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds per training step, without rewards."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, in seconds and bytes."""
        return {**vars(self), "total": self.total}


def forecast(found: Rehearsal, gpu: Gpu) -> Forecast:
    """The forecast of the step that was rehearsed.

    Computation and transfers of a part overlap: the slower one counts.

    Args:
        found: the rehearsal.
        gpu: kind of the GPUs.
    """
    measured, speed = found.measured, (COMPILED if found.compiled else EAGER) * gpu.flops
    seconds, moved = {}, {}
    for part, phases in _STAGES.items():
        flops = sum(measured.flops.get(phase, 0.0) for phase in phases)
        received = {
            name: value for name, value in measured.moved.items() if name.startswith(phases)
        }
        links = sum(
            value / (gpu.far if name.endswith("machines") else gpu.near)
            for name, value in received.items()
        )
        seconds[part] = max(flops / speed, links)
        if sum(received.values()):
            moved[part] = sum(received.values())
    return Forecast(seconds, moved)

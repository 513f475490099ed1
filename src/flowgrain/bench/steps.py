"""The steps of a bench, in order: checks first, then speed."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flowgrain.bench.acceleration import check_compile, check_tails
from flowgrain.bench.iteration import measure_iteration
from flowgrain.bench.machine import measure_machine
from flowgrain.bench.numerics import check_numerics
from flowgrain.bench.record import StepRecord
from flowgrain.bench.runs import check_process_group, check_resume
from flowgrain.bench.sampling import measure_sampling
from flowgrain.bench.setup import Setup
from flowgrain.bench.updates import measure_training

Work = Callable[[Setup, StepRecord], None]


def _of(measure: Callable[..., Any], kind: str) -> Work:
    return partial(measure, kind=kind)


STEPS: Mapping[str, Work] = {
    "machine": measure_machine,
    "numerics": check_numerics,
    "process-group": check_process_group,
    "resume": check_resume,
    "compile": check_compile,
    "tails": check_tails,
    "sampling-sd3": _of(measure_sampling, "sd3"),
    "sampling-flux": _of(measure_sampling, "flux"),
    "iteration-sd3": _of(measure_iteration, "sd3"),
    "iteration-flux": _of(measure_iteration, "flux"),
    "training-sd3": _of(measure_training, "sd3"),
    "training-flux": _of(measure_training, "flux"),
}
"""Every step by name. A step runs in its own process."""


def run_step(name: str, setup: Setup, record: StepRecord) -> None:
    """Run a step and finish its record. An error outside of a measurement is recorded, too."""
    try:
        STEPS[name](setup, record)
    except Exception as error:
        record.fail(error)
    record.finish()

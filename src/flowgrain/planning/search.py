"""Settings that fit on a number of GPUs: `flowgrain rehearse --search`.

Layouts are tried in a fixed order, usually the fastest first, until one fits.

Memory grows with the rows of a call by the same amount for every row. Rehearsals with eight and
sixteen rows give a line for each phase, and the line gives the largest number of rows that fits.
The settings that are found are rehearsed. Rehearsals with one row would take several times as long,
because they have more calls.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.planning.forecast import forecast
from flowgrain.planning.gpus import Gpu, gpu_count
from flowgrain.planning.plan import prompt_cost
from flowgrain.planning.rehearsal.step import FIRST, LATER
from flowgrain.planning.rehearse import Rehearsal, RehearsalError, Rehearser, prepared
from flowgrain.settings import SettingsError
from flowgrain.training.memory import USABLE_SHARE

NUMBERS = (1, 2, 4, 8, 16)
"""Numbers of GPUs that are searched by default."""
_LORA = {"lora.rank": 32, "optimizer.learning_rate": 1e-4}
_PROBES = (8, 16)
"""Rows of the rehearsals that give the lines."""
MOST_ROWS = 64
"""Largest batch that is proposed. Larger ones are rarely faster."""
_BATCHES = {
    "sampling.batch_size": ("sample",),
    "training.micro_batch_size": (FIRST, LATER),
    "sampling.decode_batch_size": ("decode",),
}
"""Settings that are searched, and the phases whose memory grows with them."""


@dataclass(frozen=True)
class Proposal:
    """Settings for a number of GPUs.

    Attributes:
        gpus: number of GPUs.
        fits: whether anything fits. Otherwise the settings are those that need least memory.
        settings: overrides "section.key=value".
        memory: largest need of a GPU in bytes. If nothing fits, that of batches with one row,
            according to the lines.
        seconds: forecast of a step, without rewards. If nothing fits, with larger batches.
        images_per_second: images of a step over all GPUs, divided by its seconds.
    """

    gpus: int
    fits: bool
    settings: list[str]
    memory: float
    seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def proposals(
    config: Config,
    gpu: Gpu,
    numbers: tuple[int, ...] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Proposal]:
    """Settings for each number of GPUs: the first layout that fits, with the largest batches.

    A full fine-tune is proposed as LoRA where it does not fit. Settings whose step raises an error
    are left out.

    Args:
        config: settings of the run.
        gpu: kind of the GPUs.
        numbers: numbers of GPUs. Default: those of `NUMBERS` that context groups divide.
        progress: called with a line of text before every rehearsal, and for every error.

    Raises:
        SettingsError: this configuration cannot be rehearsed.
        RehearsalError: all settings raise an error for a number of GPUs. The error is the last one.
    """
    note = progress or (lambda _: None)
    numbers = numbers or _divided(config.runtime.context_parallel)
    for gpus in numbers:
        prepared(config, gpus, gpu)  # refuses settings that no candidate changes
    with Rehearser() as process:
        return [_first_that_fits(process, config, gpu, gpus, note) for gpus in numbers]


def _divided(degree: int) -> tuple[int, ...]:
    """The numbers of GPUs that groups of `degree` ranks divide.

    Raises:
        SettingsError: there are none.
    """
    numbers = tuple(n for n in NUMBERS if n % degree == 0)
    if not numbers:
        raise SettingsError(
            f"runtime.context_parallel={degree}: divides none of {', '.join(map(str, NUMBERS))} "
            "GPUs. Give a number of GPUs with --gpus."
        )
    return numbers


def _first_that_fits(
    process: Rehearser, config: Config, gpu: Gpu, gpus: int, progress: Callable[[str], None]
) -> Proposal:
    """The first candidate that fits on `gpus` GPUs, or the one that needs least memory."""
    tried: list[Proposal] = []
    failure: RehearsalError | SettingsError | None = None
    for changes in _candidates(config, gpus):
        label = f"{gpu_count(gpus)}: {' '.join(_written(changes))}"
        progress(label)
        try:
            tried.append(_largest(process, config, changes, gpus, gpu))
        except (RehearsalError, SettingsError) as error:
            progress(f"{label}: {error}")
            if isinstance(error, SettingsError) and str(error) == str(failure):
                raise  # no layout changes it
            failure = error
            continue
        if tried[-1].fits:
            return tried[-1]
    if failure is not None and not tried:
        raise failure
    return min(tried, key=lambda proposal: proposal.memory)


def _candidates(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Changes of `config`, usually the fastest first."""
    lora = [{}] if config.lora.rank else [{}, _LORA]
    replicas: list[dict[str, Any]] = [{}]
    if gpus > 1:
        replicas = [{"runtime.rollout_weights": w} for w in ("replica", "sharded")]
    for kind, layout, checkpointing in itertools.product(lora, replicas, (False, True)):
        reduction = (
            {} if config.lora.rank or kind else {"runtime.gradient_reduction": "micro_batch"}
        )
        yield {**kind, **layout, "model.gradient_checkpointing": checkpointing, **reduction}


def _largest(
    process: Rehearser, config: Config, changes: dict[str, Any], gpus: int, gpu: Gpu
) -> Proposal:
    """The proposal with as many rows as fit, for one layout."""

    def rehearsed(rows: Mapping[str, int]) -> Rehearsal:
        return process.rehearse(config.with_changes({**changes, **rows}), gpus, gpu)

    found = [rehearsed(dict.fromkeys(_BATCHES, rows)) for rows in _PROBES]
    usable, rows = USABLE_SHARE * gpu.memory, dict.fromkeys(_BATCHES, 1)
    lines = [_line(found, phases) for phases in _BATCHES.values()]
    if any(not slope and base > usable for base, slope in lines):
        found.insert(0, rehearsed(rows))  # the step has too few rows for a line
    need, last = _of_one_row(found), found[0]
    if need <= usable:
        rows = {setting: _most(found, of, usable) for setting, of in _BATCHES.items()}
        last = rehearsed(rows)
        while not last.fits(gpu.memory) and (fewer := _fewer(rows, last)):
            rows, last = fewer, rehearsed(fewer)
        need = last.peak[1].total
    seconds = forecast(last, gpu).total
    # Repeated prompts, if they do not divide evenly among the GPUs, do not count.
    images = config.training.prompts_per_step * prompt_cost(config).decodes
    settings = _written({**changes, **rows})
    return Proposal(gpus, need <= usable, settings, need, seconds, images / max(seconds, 1e-9))


def _size(found: Rehearsal, phases: Sequence[str]) -> tuple[int, float]:
    """Rows of the largest call in `phases`, and the largest peak in bytes."""
    rows = max(found.measured.largest.get(phase, 0) for phase in phases)
    return rows, max((found.phases[p].total for p in phases if p in found.phases), default=0.0)


def _line(found: Sequence[Rehearsal], phases: Sequence[str]) -> tuple[float, float]:
    """Bytes of `phases` without rows, and bytes of each row.

    A step can have fewer rows than its batches allow. If all calls have the same number of rows:
    the bytes with these rows, and 0.

    Args:
        found: rehearsals in order of rows.
        phases: phases that depend on the same batch.
    """
    (few, less), (many, more) = _size(found[0], phases), _size(found[-1], phases)
    if few == many:
        return more, 0.0
    slope = max(more - less, 0.0) / (many - few)
    return less - few * slope, slope


def _of_one_row(found: Sequence[Rehearsal]) -> float:
    """The largest need of a phase, in bytes, if all batches have one row."""
    return max(sum(_line(found, (phase,))) for phase in found[0].phases)


def _most(found: Sequence[Rehearsal], phases: Sequence[str], usable: float) -> int:
    """The largest number of rows with which `phases` fit into `usable` bytes. One row fits."""
    base, slope = _line(found, phases)
    if base + MOST_ROWS * slope <= usable:
        return MOST_ROWS
    return max(1, int((usable - base) / slope))


def _fewer(rows: dict[str, int], found: Rehearsal) -> dict[str, int] | None:
    """Half as many rows in the phase that needs most memory. None if they cannot be fewer."""
    batch = found.batch_of_peak
    if batch is None or rows[batch[0]] == 1:
        return None
    return {**rows, batch[0]: rows[batch[0]] // 2}


def _written(changes: dict[str, Any]) -> list[str]:
    return [f"{path}={str(value).lower()}" for path, value in changes.items()]

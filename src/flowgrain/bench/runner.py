"""Runs the steps one after the other, each in its own process with a time limit.

The record of a step is complete on the disk after each of its measurements. A step that is done is
not repeated.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrain.bench.record import Status, read_record
from flowgrain.bench.setup import CUBLAS
from flowgrain.bench.tables import write_results
from flowgrain.records.files import write_atomically
from flowgrain.records.json_text import to_json
from flowgrain.settings import SettingsError, did_you_mean

STEP_SECONDS = 480.0
"""Time limit of a step."""
_LEAST_SECONDS = 20.0
"""A step is not started with less time."""
_SOFT_SHARE = 0.85
"""Share of the limit after which a step starts no further measurement."""
_SETTINGS = "bench.json"
_CHILD = "flowgrain.bench.process"

Note = Callable[[str], None]
Launch = Callable[["Bench", str, float], Status | None]


@dataclass(frozen=True)
class Bench:
    """A bench and the directory of its results.

    Attributes:
        out: directory.
        device: "cpu" or "cuda".
        tiny: whether the speed is measured with tiny models.
    """

    out: Path
    device: str
    tiny: bool

    def file(self, step: str) -> Path:
        """The record of a step."""
        return self.out / "steps" / f"{step}.json"

    def log(self, step: str) -> Path:
        """What the process of a step printed."""
        return self.out / "steps" / f"{step}.log"


def run_bench(
    bench: Bench,
    steps: Sequence[str],
    minutes: float,
    note: Note,
    launch: Launch | None = None,
) -> list[str]:
    """Run the steps that are not done, and write results.json and results.md.

    These files also contain the steps of earlier calls with the same directory.

    Args:
        bench: what is measured, and where the results are written.
        steps: names of the steps, in order.
        minutes: total time. Steps for which none is left are not started.
        note: called with a line about every step.
        launch: runs a step within a number of seconds, and returns its status if its record does
            not have it. Default: in a new process.

    Returns:
        The names of the steps that are not done.

    Raises:
        SettingsError: the directory contains results of another device or size.
    """
    launch = launch or launch_process
    bench.out.joinpath("steps").mkdir(parents=True, exist_ok=True)
    _check_same(bench)
    end = time.monotonic() + 60 * minutes
    for number, step in enumerate(steps, 1):
        label = f"[{number}/{len(steps)}] {step}"
        if read_record(bench.file(step))["status"] == "done":
            note(f"{label}: done before")
            continue
        seconds = min(STEP_SECONDS, end - time.monotonic())
        if seconds < _LEAST_SECONDS:
            note(f"{label}: not started, because no time is left")
            continue
        begin = time.monotonic()
        status = launch(bench, step, seconds)
        record = _with_status(bench, step, status)
        error = f" ({record['error']})" if record.get("error") else ""
        note(f"{label}: {record['status']} in {time.monotonic() - begin:.0f} s{error}")
        write_results(bench.out, all_records(bench, _with_earlier(bench, steps)))
    write_results(bench.out, all_records(bench, _with_earlier(bench, steps)))
    return [step for step in steps if read_record(bench.file(step))["status"] != "done"]


def all_records(bench: Bench, steps: Sequence[str]) -> list[dict[str, Any]]:
    """The records of `steps`, in order."""
    return [read_record(bench.file(step)) for step in steps]


def _with_earlier(bench: Bench, steps: Sequence[str]) -> list[str]:
    """`steps`, and the other steps of the directory, which earlier calls ran."""
    found = {file.stem for file in bench.out.joinpath("steps").glob("*.json")}
    return [*steps, *sorted(found - set(steps))]


def choose_steps(chosen: Sequence[str], known: Sequence[str]) -> list[str]:
    """The steps `chosen`, or all, in the order of `known`.

    Raises:
        SettingsError: there is no such step.
    """
    for step in chosen:
        if step not in known:
            raise SettingsError(
                f"--step {step}: there is no such step. {did_you_mean(step, known)}"
            )
    return [step for step in known if step in chosen or not chosen]


def launch_process(bench: Bench, step: str, seconds: float) -> Status | None:
    """Run a step in a new process. The process and its children are killed after `seconds`."""
    size = "tiny" if bench.tiny else "real"
    soft = str(_SOFT_SHARE * seconds)
    words = [sys.executable, "-m", _CHILD, step, str(bench.file(step)), bench.device, size, soft]
    # Deterministic matrix products of CUDA need it before the first one.
    environment = {**os.environ, CUBLAS: ":4096:8"}
    with bench.log(step).open("wb") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # also the workers of the compiler
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "timeout"
            raise
    return "crashed" if status else None


def _with_status(bench: Bench, step: str, status: Status | None) -> dict[str, Any]:
    """The record of a step that ran, with the status of a process that did not finish it."""
    record = read_record(bench.file(step))
    if status is None and record["status"] in ("running", "not started"):
        status = "crashed"
    if status is not None:
        log = bench.log(step)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        error = "the time limit is reached"
        if status == "crashed":
            error = f"the process died: {lines[-1][:300]}" if lines else "the process died"
        record |= {"status": status, "error": error}
        write_atomically(bench.file(step), to_json(record))
    return record


def _check_same(bench: Bench) -> None:
    """Check that the directory has results of the same device and size, or none yet.

    Raises:
        SettingsError: it has others, or the file that says so is damaged.
    """
    file = bench.out / _SETTINGS
    own = {"device": bench.device, "tiny": bench.tiny}
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SettingsError(
                f"--out {bench.out}: {_SETTINGS} in it is damaged ({error}). Use another directory."
            ) from error
        if found != own:
            raise SettingsError(
                f"--out {bench.out}: contains results of {found}, not of {own}. "
                "Use another directory."
            )
    write_atomically(file, to_json(own))

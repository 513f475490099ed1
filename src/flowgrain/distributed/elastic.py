"""Restarts by torchrun: which job this process belongs to, and errors that a restart would repeat.

torchrun restarts the processes of a job after a failure (`--max-restarts`), and after a machine
joined or left (`--nnodes MIN:MAX`). It does so after any exit status except 0.
"""

import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flowgrain.records.files import write_atomically

_ERROR = "flowgrain-error.json"
"""File in torchrun's log directory, which all attempts on a machine share."""


@dataclass(frozen=True)
class Job:
    """The torchrun job of a process.

    Attributes:
        run_id: `--rdzv-id`, None if it was not set. The same on all machines, and after a job
            scheduler started the job again with the same id.
        agent: the torchrun process of this machine. The same after a restart by torchrun.
    """

    run_id: str | None
    agent: str

    def is_same(self, other: "Job") -> bool:
        """Whether two processes belong to the same job."""
        return self.agent == other.agent or (
            self.run_id is not None and self.run_id == other.run_id
        )


def torchrun_job() -> Job | None:
    """The torchrun job of this process. None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    parent = os.getppid()
    try:
        started = psutil.Process(parent).create_time()
    except psutil.Error:
        started = 0.0
    agent = f"{socket.gethostname()} {parent} {started:.2f}"
    return Job(None if run_id == "none" else run_id, agent)  # torchrun's default is the text none


def write_job(file: Path) -> None:
    """Write the torchrun job of this process to `file`. Without torchrun the file is deleted."""
    job = torchrun_job()
    if job is None:
        file.unlink(missing_ok=True)
    else:
        write_atomically(file, json.dumps(asdict(job)))


def is_of_this_job(file: Path) -> bool:
    """Whether a process of the same torchrun job wrote `file` with `write_job`."""
    job = torchrun_job()
    try:
        return job is not None and job.is_same(Job(**json.loads(file.read_text("utf-8"))))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class LastError:
    """An error of an earlier attempt of the same job on this machine.

    Attributes:
        kind: name of its class.
        message: its message.
        attempt: number of the attempt, from 0. It does not change if torchrun restarts a job
            because a machine joined or left.
    """

    kind: str
    message: str
    attempt: int


def attempt() -> int:
    """How often torchrun has restarted this job on this machine because of a failure."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isascii() and count.isdigit() else 0


def record_error(kind: str, message: str) -> None:
    """Record that an attempt ended with an error that a restart would repeat."""
    file = _error_file()
    if file is not None:
        write_atomically(file, json.dumps(asdict(LastError(kind, message, attempt()))))


def forget_error() -> None:
    """Delete the recorded error."""
    file = _error_file()
    if file is not None:
        file.unlink(missing_ok=True)


def last_error() -> LastError | None:
    """The error that an earlier attempt recorded on this machine."""
    file = _error_file()
    try:
        return None if file is None else LastError(**json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _error_file() -> Path | None:
    """The file of the error. None without torchrun, or if its log directory is unknown."""
    # torchrun: <log_dir>/<run_id>/attempt_<attempt>/<rank>/error.json
    attempt_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    known = "TORCHELASTIC_RUN_ID" in os.environ and re.fullmatch(
        r"attempt_\d+", attempt_folder.name
    )
    return attempt_folder.parent / _ERROR if known else None

"""The process of a step: python -m flowgrain.bench.process STEP FILE DEVICE TINY SECONDS."""

import os
import sys
import tempfile
from pathlib import Path

from flowgrain.bench.record import StepRecord
from flowgrain.bench.setup import CUBLAS, Setup
from flowgrain.bench.steps import run_step
from flowgrain.models.quiet import quiet_libraries


def main(words: list[str]) -> int:
    """Run a step. The exit status is 0 if its record is complete, also with failed measurements."""
    name, file, device, size, seconds = words
    os.environ.setdefault(CUBLAS, ":4096:8")
    quiet_libraries()
    record = StepRecord(name, Path(file), float(seconds))
    with tempfile.TemporaryDirectory(prefix="flowgrain-bench-") as folder:
        run_step(name, Setup(device, size == "tiny", Path(folder)), record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

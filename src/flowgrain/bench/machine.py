"""What the machine has: versions, the GPU, and the rate of a large matrix product."""

import importlib.metadata
import platform
from functools import partial
from typing import Any

import torch

from flowgrain.bench.record import StepRecord
from flowgrain.bench.setup import Setup
from flowgrain.bench.timing import data_sheet, matrix_product

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "triton", "flash-attn")


def measure_machine(setup: Setup, record: StepRecord) -> None:
    """Record the versions, the GPU and the matrix rates."""
    record.run("versions", versions)
    record.run("device", partial(describe, setup.device))
    for dtype in (torch.bfloat16, torch.float32):
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        sizes = setup.sizes
        work = partial(matrix_product, setup.device, dtype, sizes.matrix, sizes.repeats)
        record.run(name, work)


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that matter. None: not installed."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def describe(device: torch.device) -> dict[str, Any]:
    """Name, memory, compute capability and data-sheet rate of the device."""
    if device.type != "cuda":
        return {"name": f"{platform.machine()} CPU", "threads": torch.get_num_threads()}
    properties, sheet = torch.cuda.get_device_properties(device), data_sheet(device)
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "capability": f"{properties.major}.{properties.minor}",
        "data_sheet_tflops": sheet.flops / 1e12 if sheet else None,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }

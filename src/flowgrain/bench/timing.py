"""Medians of repeated measurements, peak memory, and the rate of the device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from flowgrain.planning.gpus import GPUS, Gpu


def synchronize(device: torch.device) -> None:
    """Wait until the work that was started on a GPU is finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of `work`, until its work on the device is finished."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median seconds of `repeats` calls of `work` after a warm-up call, and the peak memory.

    Returns:
        seconds: the median; repeats: all of them; warmup_seconds: the first call, which also
        compiles; peak_gb: largest memory of torch's allocator in 10^9 bytes, on a GPU only.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warmup = seconds_of(work, device)
    seconds = [seconds_of(work, device) for _ in range(repeats)]
    values: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "repeats": seconds,
        "warmup_seconds": warmup,
    }
    if device.type == "cuda":
        values["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values


def data_sheet(device: torch.device) -> Gpu | None:
    """The data sheet of the GPU, by its name. None for a CPU or a GPU that is not listed."""
    return None if device.type != "cuda" else listed(torch.cuda.get_device_name(device))


def listed(name: str) -> Gpu | None:
    """The data sheet of the GPU with the name of the driver. The PCIe variants are slower."""
    words = name.lower().split()
    if "h100" in words or "h200" in words:
        words = [] if {"pcie", "nvl"} & set(words) else words
    return next((gpu for key, gpu in GPUS.items() if any(w.startswith(key) for w in words)), None)


def utilization(flops: float, seconds: float, device: torch.device) -> dict[str, float]:
    """Achieved TFLOP/s, and the share of the bfloat16 rate of the data sheet (MFU) if it is known.

    Args:
        flops: FLOPs of the model, without recomputed ones.
        seconds: their time.
        device: the device.
    """
    values = {"tflops_per_second": flops / seconds / 1e12}
    sheet = data_sheet(device)
    return {**values, "mfu": flops / seconds / sheet.flops} if sheet else values


def matrix_product(
    device: torch.device, dtype: torch.dtype, side: int, repeats: int
) -> dict[str, Any]:
    """Seconds and TFLOP/s of ten products of square matrices with `side` rows."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            torch.mm(a, b)

    values = timed(products, device, repeats)
    return {**values, "side": side, **utilization(20 * side**3, values["seconds"], device)}

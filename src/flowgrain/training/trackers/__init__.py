"""Trackers: TensorBoard, Weights & Biases and Trackio receive copies of a run's records.

The directory of the run stays the complete record. Each tracker works in a thread of its own, and
a tracker that fails is switched off with one warning.
"""

from flowgrain.training.trackers.base import (
    TRACKERS,
    ImageTable,
    TrackedRun,
    Tracker,
    check_installed,
)
from flowgrain.training.trackers.fan_out import Trackers, open_trackers

__all__ = [
    "TRACKERS",
    "ImageTable",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "check_installed",
    "open_trackers",
]

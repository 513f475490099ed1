"""Monitors: numbers about images and a policy that are never trained on.

The table imports no torch, so that tools which only read records can use it.
"""

from flowgrain.monitors.table import MONITORS, Direction, Monitor

__all__ = ["MONITORS", "Direction", "Monitor"]

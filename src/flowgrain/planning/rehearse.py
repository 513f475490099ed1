"""A rehearsal of the first training step at full size, without GPUs and without weights."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.planning.gpus import GPUS, Gpu, gpu_named
from flowgrain.planning.rehearsal.ledger import Peak
from flowgrain.planning.rehearsal.step import Measurement
from flowgrain.settings import SettingsError
from flowgrain.training.memory import USABLE_SHARE
from flowgrain.training.sizes import size_before_loading

_REPLICA_SHARE = 0.4
"""runtime.rollout_weights=auto takes a replica below this share of the free memory."""

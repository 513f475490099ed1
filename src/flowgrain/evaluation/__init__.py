"""The command `flowgrain evaluate`: models x prompts x seeds x steps, scored by all rewards."""

from flowgrain.evaluation.request import EvaluationRequest, make_request
from flowgrain.evaluation.run import Progress, run_evaluation
from flowgrain.evaluation.storage import read_scores
from flowgrain.evaluation.table import Table, make_table
from flowgrain.evaluation.targets import Target, base_config, find_targets, load_target
from flowgrain.statistics import Interval, confidence_interval

__all__ = [
    "EvaluationRequest",
    "Interval",
    "Progress",
    "Table",
    "Target",
    "base_config",
    "confidence_interval",
    "find_targets",
    "load_target",
    "make_request",
    "make_table",
    "read_scores",
    "run_evaluation",
]

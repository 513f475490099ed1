"""Files of a run: reading and writing without torch."""

from flowgrain.records.evaluations import EvaluationRecord
from flowgrain.records.group_files import GroupStore
from flowgrain.records.groups import GroupRecord, GroupTree, PromptGroup
from flowgrain.records.history import History
from flowgrain.records.images import DamagedRecord
from flowgrain.records.run import Run, load_run

__all__ = [
    "DamagedRecord",
    "EvaluationRecord",
    "GroupRecord",
    "GroupStore",
    "GroupTree",
    "History",
    "PromptGroup",
    "Run",
    "load_run",
]

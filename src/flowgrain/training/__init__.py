"""Training: the policy, the training step, the loop, checkpoints and the files of a run."""

from flowgrain.training.errors import Diverged, Interrupted, RunStopped
from flowgrain.training.trainer import Trainer

__all__ = ["Diverged", "Interrupted", "RunStopped", "Trainer"]

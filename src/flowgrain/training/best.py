"""Export of the best checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flowgrain.training import checkpoint
from flowgrain.training.export import export_policy

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer


def export_best(trainer: Trainer) -> Path | None:
    """Write the parameters of the best checkpoint. See `Trainer.export_best`.

    Another checkpoint than the last is read into the policy. Then the last is read again.
    """
    folder, out = trainer.out / "checkpoints", trainer.out / "export" / "best"
    found = trainer.world.on_main(lambda: checkpoint.best(folder))
    if found is None:
        return None
    last = checkpoint.path_of(folder, trainer.steps_done)
    try:
        if found != last:
            _read(trainer, found)
        export_policy(trainer.policy, out)
    finally:
        if found != last:
            _read(trainer, last)
    return out


def _read(trainer: Trainer, path: Path) -> None:
    policy = trainer.policy
    checkpoint.read(path, policy.tensors(), trainer.world)
    policy.refresh()

"""Export of the best checkpoint of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrain.training import checkpoint

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer

log = logging.getLogger(__name__)


def export_best(trainer: Trainer) -> Path | None:
    """Write the parameters of the best checkpoint to export/best. The last step must be saved.

    Another checkpoint than the last is read into the policy. Then the last is read again.

    Returns:
        The directory. None if no checkpoint was evaluated, all of them have an alarm, or the best
        is damaged, with a warning.
    """
    folder, out = trainer.out / "checkpoints", trainer.out / "export" / "best"
    found = trainer.world.on_main(lambda: checkpoint.best(folder))
    if found is None:
        return None
    last = checkpoint.path_of(folder, trainer.steps_done)
    try:
        if found != last:
            trainer.world.on_main(lambda: checkpoint.load(found))  # verifies the checksums
            _read(trainer, found)
        trainer.export(out)
    except checkpoint.CheckpointError as error:
        log.warning("The best checkpoint is not exported: %s.", error)
        return None
    finally:
        if found != last:
            _read(trainer, last)
    return out


def _read(trainer: Trainer, path: Path) -> None:
    policy = trainer.policy
    checkpoint.read(path, policy.tensors(), trainer.world)
    policy.refresh()

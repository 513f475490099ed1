"""Export of a checkpoint of a run."""

from pathlib import Path

from flowgrain.config.schema import Config
from flowgrain.evaluation.targets import or_export
from flowgrain.records.run_yaml import read_run
from flowgrain.settings import SettingsError
from flowgrain.training import RunStopped, checkpoint
from flowgrain.training.export import export_policy
from flowgrain.training.load import compute_device, load_model
from flowgrain.training.policy import Policy
from flowgrain.training.run_files import last_step, read_run_config


def export_run(folder: Path, name: str | None = None, out: Path | None = None) -> tuple[Path, Path]:
    """Write the weights of a checkpoint, in a format that diffusers loads.

    Args:
        folder: directory of the run.
        name: step of the checkpoint, or "best". Default: the last good checkpoint.
        out: directory to write. Default: `folder`/export, or `folder`/export-NAME.

    Returns:
        The directory, and the checkpoint.

    Raises:
        SettingsError: there is no such run or checkpoint, or the directory cannot be written.
        CheckpointError: the checkpoint is damaged.
        RunStopped: a parameter is not finite. Nothing was written.
    """
    config = _config_of_export(read_run_config(folder))
    if "backbone" in read_run(folder).get("given", []):
        raise SettingsError(
            f"{folder}: this run was started from Python with its own backbone. Export it from "
            "Python: trainer = Trainer(..., backbone=...); trainer.restore(); trainer.export()."
        )
    source = _find_checkpoint(folder, name)
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"--out {out}: exists. Give a new directory.")
    target = out or folder / ("export" if name is None else f"export-{name}")
    model, device = load_model(config, train=False), compute_device("cpu")
    policy = Policy.for_sampling(config, model, device, adapter=config.lora.rank > 0)
    policy.load_for_sampling(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        export_policy(policy, target)
    except RunStopped as error:
        raise RunStopped(
            f"{source}: {error}. Export an earlier checkpoint with --checkpoint STEP."
        ) from error
    except OSError as error:
        raise SettingsError(
            f"--out {target}: cannot be written ({error.strerror or error}). Set another directory."
        ) from error
    return target, source


def _config_of_export(config: Config) -> Config:
    """`config` on the CPU. All parameters are loaded in float32, frozen ones in 16 bits."""
    dtype = "float32" if config.lora.rank == 0 else config.runtime.dtype
    dtype = "bfloat16" if dtype == "auto" else dtype
    runtime = config.runtime.model_copy(update={"device": "cpu", "dtype": dtype})
    return config.model_copy(update={"runtime": runtime})


def _find_checkpoint(folder: Path, name: str | None) -> Path:
    """The checkpoint of a run that `name` names.

    Raises:
        SettingsError: there is no such checkpoint.
    """
    saved = checkpoint.checkpoints(folder / "checkpoints")
    if not saved:
        step = last_step(folder)
        if step == 0:
            raise SettingsError(
                f"{folder}: not trained yet. Train it with flowgrain train --resume {folder}."
            )
        raise SettingsError(
            f"{folder / 'checkpoints'}: the checkpoints of this run are gone, but it was trained "
            f"to step {step}. Restore the directory{or_export(folder) or '.'}"
        )
    if name is None:
        try:
            newest, _, _ = checkpoint.load_last_good(folder / "checkpoints")
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}{or_export(folder)}") from error
        return newest or saved[-1]
    if name == "best":
        best = checkpoint.best(folder / "checkpoints")
        if best is None:
            raise SettingsError(
                f"--checkpoint best: no checkpoint in {folder} was evaluated without an alarm. "
                f"Give a step: {_steps(saved)}."
            )
        return best
    found = [path for path in saved if name.isascii() and name.isdigit() and _is_step(path, name)]
    if not found:
        raise SettingsError(
            f"--checkpoint {name}: there is no such checkpoint in {folder}. Use {_choices(folder)}."
        )
    return found[0]


def _choices(folder: Path) -> str:
    """The values of --checkpoint that exist."""
    saved = checkpoint.checkpoints(folder / "checkpoints")
    steps = f"{'one of the steps' if len(saved) > 1 else 'step'} {_steps(saved)}"
    return f"best, or {steps}" if checkpoint.best(folder / "checkpoints") else steps


def _is_step(path: Path, name: str) -> bool:
    return str(checkpoint.step_of(path)) == (name.lstrip("0") or "0")


def _steps(saved: list[Path]) -> str:
    return ", ".join(str(checkpoint.step_of(path)) for path in saved)

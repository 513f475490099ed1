"""Check before a run starts that this machine has what the run needs: memory, disk, libraries.

The sizes are computed from the settings. Nothing is allocated. Activations, which grow with
sampling.batch_size and the micro-batches, are not estimated.
"""

import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from flowgrain.config.schema import Config
from flowgrain.core.explore import candidates_of
from flowgrain.core.tree import Tree
from flowgrain.distributed import env_rank, local_world_size
from flowgrain.methods import DifferentiableReward, PolicyGradient
from flowgrain.methods.calibration import calibration_tree
from flowgrain.models import Backbone
from flowgrain.settings import SettingsError, SettingsWarning
from flowgrain.training.checkpoint import checkpoints
from flowgrain.training.context import check_context, check_ranks
from flowgrain.training.disk import image_size, largest_setting, run_bytes
from flowgrain.training.load import check_encoder, check_prompt_files, compute_dtype
from flowgrain.training.memory import memory, trained_parameters
from flowgrain.training.rollouts.checks import check_workers
from flowgrain.training.sizes import ModelSize, size_of_loaded
from flowgrain.training.trackers.base import check_installed

_ROW_BYTES = 100
"""Bytes of a row of the tree of all prompts, with the copies that are made of it."""
_FIX = "Use lora.rank=32, a smaller model, or more GPUs"
_CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container on Linux."""


@dataclass(frozen=True)
class Need:
    """Bytes that are needed for one purpose, and the setting that determines them.

    Attributes:
        size: bytes.
        purpose: what needs them.
        setting: full path of the setting.
        value: value of the setting.
        fix: what to do if the value cannot be made smaller. None: the bytes are proportional to it.
    """

    size: float
    purpose: str
    setting: str
    value: object
    fix: str | None = None


def check_start(config: Config, given: Sequence[str] = ()) -> None:
    """Check prompt files, libraries and the embedding cache, and issue warnings about settings.

    Args:
        config: settings of the run.
        given: names of the Trainer's arguments that replace settings.

    Raises:
        SettingsError: a file or a library is missing, the cache cannot be written, or the number of
            processes does not fit runtime.context_parallel.
    """
    check_ranks(config.runtime.context_parallel)
    check_prompt_files(config)
    check_workers(config, given)
    for message in config.warnings() if env_rank()[0] == 0 else ():
        warnings.warn(message, SettingsWarning, stacklevel=3)
    for tracker in config.runtime.trackers:
        check_installed(tracker)
    cache = config.model.embedding_cache
    if cache and config.model.name != "shapes":
        try:
            check_writable(Path(cache).expanduser())
        except (OSError, RuntimeError) as error:
            raise SettingsError(
                f"model.embedding_cache={cache}: cannot be written ({error}). "
                "Set another directory."
            ) from error


def check_memory(config: Config, size: ModelSize | None, device: torch.device) -> None:
    """Check that the run fits into the memory of the device and of the machine.

    Args:
        config: configuration of the run.
        size: size of its model. None: not known yet, and nothing is checked.
        device: compute device.

    Raises:
        SettingsError: it does not fit. The message names the setting, its value, the needed and the
            available memory.
    """
    if size is None:
        return
    ranks = env_rank()[1]
    groups = max(ranks // config.runtime.context_parallel, 1)
    on_device, on_host = _of_device(config, size, device, ranks), _of_host(config, size, groups)
    if device.type == "cuda":
        available = float(torch.cuda.mem_get_info(device)[1])
        _refuse(on_device, available, "of memory, but the GPU has")
    else:
        on_host += on_device
    available = machine_memory() / local_world_size()
    _refuse(on_host, available, "of memory, but this machine has")


def check_loaded(config: Config, backbone: Backbone, device: torch.device) -> ModelSize:
    """The size of a loaded backbone, after `check_context` and `check_memory`.

    Raises:
        SettingsError: the run does not fit, the backbone does not encode images and must, or it
            does not support runtime.context_parallel.
    """
    check_context(config, backbone)
    check_encoder(config, backbone)
    size = size_of_loaded(backbone, config.lora.target_modules)
    check_memory(config, size, device)
    return size


def check_disk(config: Config, size: ModelSize, folder: Path) -> None:
    """Check that checkpoints and records fit on the disk of `folder`, the run's directory.

    Raises:
        SettingsError: they do not fit.
    """
    needed, place = run_bytes(config, size), existing_parent(folder)
    # The files of a resumed run are replaced one after the other.
    saved = [f for path in checkpoints(folder / "checkpoints") for f in path.iterdir()]
    saved += [file for part in ("groups", "evaluations") for file in (folder / part).glob("*.zip")]
    total = max(sum(needed.values()) - sum(file.stat().st_size for file in saved), 0)
    if total > shutil.disk_usage(place).free:
        largest = max(needed, key=lambda purpose: needed[purpose])
        setting, value = largest_setting(config, largest)
        free = in_bytes(shutil.disk_usage(place).free)
        parts = ", ".join(f"{purpose} {in_bytes(part)}" for purpose, part in needed.items())
        raise SettingsError(
            f"{setting}={value}: the run needs {in_bytes(total)} ({parts}), but only {free} are "
            f"free in {place}. Use a smaller value, or free some space."
        )


def check_writable(folder: Path) -> None:
    """Check that `folder` can be created, or written if it exists. Leaves nothing behind.

    Raises:
        OSError: it cannot.
    """
    with tempfile.TemporaryDirectory(dir=existing_parent(folder)):
        pass


def machine_memory() -> float:
    """Bytes of memory of this machine, or of this container or process if they are limited."""
    total = float(psutil.virtual_memory().total)
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        total = total if limit == resource.RLIM_INFINITY else min(total, float(limit))
    try:
        return min(total, float(_CGROUP.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max"
        return total


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest directory above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def in_bytes(size: float) -> str:
    """A number of bytes in MB, GB or TB."""
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e12 else f"{size / 1e12:.1f} TB"


def _of_device(config: Config, size: ModelSize, device: torch.device, ranks: int) -> list[Need]:
    """What a rank holds on its device."""
    dtype = compute_dtype(config.runtime.dtype, device)
    parts = dict(memory(config, size, dtype, ranks).parts)
    latents, activations = (parts.pop(name, 0.0) for name in ("latents", "decoder activations"))
    model, rank = config.model, config.lora.rank
    adapter = 4.0 * rank * size.adapter
    if adapter > size.transformer:
        parameters = Need(sum(parts.values()), "the adapters", "lora.rank", rank)
    else:
        parameters = Need(sum(parts.values()), "the parameters", "model.name", model.name, _FIX)
    needs = [parameters, _of_step(config, latents, "the latents of a step")]
    if activations and isinstance(config.method, DifferentiableReward):
        images = config.method.decode_batch_size
        setting, value = ("method.decode_batch_size", images)
        if images == 1:
            setting, value = "model.height", model.height
        needs.append(Need(activations, "the activations of the decoder", setting, value))
    return needs


def _of_host(config: Config, size: ModelSize, groups: int) -> list[Need]:
    """What a rank holds in the memory of the machine: the tree, and images as float32.

    `groups`: number of context groups, see `World.data_size`.
    """
    tree = config.tree()
    height, width = image_size(config)
    image = 2 * 4.0 * 3 * height * width  # the parts, and all of them in one tensor
    images = _images_of_step(config, tree, image / groups)
    evaluation = config.evaluation
    evaluated = 0 if evaluation.every == 0 else evaluation.images_of_run
    needs = [
        images,
        Need(
            image * evaluated / groups,
            "the images of an evaluation",
            "evaluation.num_prompts",
            evaluated,
        ),
    ]
    if config.rollout.max_staleness:
        # The parameters of two steps, and a copy while the old log-probabilities are computed.
        trained = trained_parameters(config, size)
        fix = "Use rollout.max_staleness=0"
        setting = ("rollout.max_staleness", config.rollout.max_staleness)
        needs.append(Need(12.0 * trained, "the parameters of older steps", *setting, fix))
    if isinstance(config.method, PolicyGradient) and config.method.needs_calibration:
        of_round, samples = (
            calibration_tree(config.method, config.sampling.num_steps),
            config.method.calibration.samples,
        )
        per_sample = _ROW_BYTES * len(of_round) + image * len(of_round.leaves) / groups
        needs.append(
            Need(
                (per_sample + 4.0 * size.latent * len(of_round) / groups) * samples,
                "the images of a calibration round",
                "method.calibration.samples",
                samples,
            )
        )
    return needs


def _images_of_step(config: Config, tree: Tree, image: float) -> Need:
    """The images of a step, or of its candidates if these are larger.

    `tree`: exact tree of one prompt. `image`: bytes of an image, divided by the context groups.
    """

    def size(of_prompt: Tree) -> float:
        bytes_ = image * len(of_prompt.leaves) + _ROW_BYTES * len(of_prompt)
        return float(bytes_ * config.training.prompts_per_step)

    explore = config.sampling.explore
    exact = _of_step(config, size(tree), "the images of a step")
    if not explore.candidates:
        return exact
    cheap = size(candidates_of(tree, explore.candidates, explore.num_steps).tree)
    candidates = ("sampling.explore.candidates", explore.candidates)
    return max(exact, Need(cheap, "the images of the candidates", *candidates), key=_size)


def _size(need: Need) -> float:
    return need.size


def _of_step(config: Config, size: float, purpose: str) -> Need:
    """A need that grows with the prompts and the group. Names the one to make smaller."""
    prompts, group = config.training.prompts_per_step, config.method.group_size
    if prompts >= group:
        return Need(size, purpose, "training.prompts_per_step", prompts)
    return Need(size, purpose, "method.group_size", group)


def _refuse(needs: list[Need], available: float, sentence: str) -> None:
    """Raise an error about the largest need, if the needs together exceed `available` bytes."""
    total = sum(need.size for need in needs)
    if total <= available:
        return
    largest = max(needs, key=_size)
    scaled = sum(need.size for need in needs if need.setting == largest.setting)
    share = (available - (total - scaled)) / scaled
    limit = 0 if largest.fix else int(int(str(largest.value)) * share)
    fix = f"Use at most about {limit:,}" if limit > 0 else largest.fix or "Use a smaller value"
    raise SettingsError(
        f"{largest.setting}={largest.value}: {largest.purpose} need {in_bytes(largest.size)} "
        f"{sentence} {in_bytes(available)}. {fix}."
    )

"""Running an evaluation, chunk by chunk. Ranks share the chunks. Finished chunks are skipped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowgrain.config.schema import Config
from flowgrain.data import Prompt, existing_file
from flowgrain.distributed import env_rank
from flowgrain.distributed.threads import set_threads
from flowgrain.evaluation.request import EvaluationRequest, record_request
from flowgrain.evaluation.storage import (
    Chunk,
    Columns,
    chunks,
    read_chunk,
    write_chunk,
    write_images,
)
from flowgrain.evaluation.targets import load_target
from flowgrain.models import Backbone
from flowgrain.records.run_yaml import read_run
from flowgrain.rewards import Reward
from flowgrain.settings import SettingsError
from flowgrain.training.evaluate import Evaluation, evaluate, warn_of_failures
from flowgrain.training.load import load_prompts, load_rewards
from flowgrain.training.policy import Policy


@dataclass(frozen=True)
class Progress:
    """Number of finished chunks of an evaluation, over all ranks."""

    finished: int
    total: int


def run_evaluation(
    request: EvaluationRequest,
    folder: Path,
    show: Callable[[Progress], None] | None = None,
    *,
    backbone: Backbone | None = None,
    rewards: Mapping[str, Reward] | None = None,
    prompts: Sequence[str | Prompt] | None = None,
) -> Progress:
    """Evaluate this rank's share of the chunks that `folder` does not contain yet.

    Under torchrun every rank takes every n-th chunk. Ranks do not wait for each other. When all
    chunks are finished, `make_table` reads them.

    Args:
        request: what to evaluate.
        folder: output directory.
        show: called after every chunk.
        backbone: a backbone from Python, in place of the backbone in the settings. It is not
            changed. Every model is loaded into a deep copy.
        rewards: rewards from Python by name, in place of the `rewards` of the settings.
        prompts: evaluation prompts from Python, in place of `data.eval_prompts`.

    Raises:
        SettingsError: a model, a reward or the prompts cannot be loaded, or the directory contains
            another evaluation.
    """
    rank, size = _start_rank(request)
    config, overrides = request.config, request.overrides
    if config.data.eval_prompts is not None:
        existing_file("data.eval_prompts", config.data.eval_prompts)  # before a model is loaded
    given = {"backbone": backbone, "rewards": rewards, "prompts": prompts}
    names = [name for name, value in given.items() if value is not None]
    _check_given(request, names)
    all_rewards = load_rewards(config, rewards)[1]
    if not all_rewards:
        raise SettingsError(
            "evaluation.rewards is empty. Name a reward: evaluation.rewards=[clip]."
        )
    target = request.targets[0]
    policy, sampling = load_target(target, config, overrides, backbone)
    chosen = load_prompts(config, policy.backbone, "eval", prompts)
    repeated = [chosen[i % len(chosen)] for i in range(config.evaluation.num_prompts)]
    record_request(request, folder, repeated, all_rewards, names)
    every = list(chunks(request, len(repeated)))
    for chunk, existing in _unfinished(request, folder, every[rank::size], all_rewards):
        if chunk.target != target:
            del policy  # only one model is in memory at a time
            target = chunk.target
            policy, sampling = load_target(target, config, overrides, backbone)
        chunk_prompts = [repeated[place] for place in chunk.places]
        sizes = _reward_batch_sizes(config)
        evaluation = _evaluate_chunk(policy, sampling, chunk, chunk_prompts, all_rewards, sizes)
        if request.keep_images:
            write_images(folder, chunk, evaluation)
        write_chunk(folder, chunk, _with_earlier_scores(evaluation, existing))
        if show is not None:
            show(_progress(folder, every))
    return _progress(folder, every)


def _check_given(request: EvaluationRequest, given: Sequence[str]) -> None:
    """Check that the rewards and prompts of the first run are available.

    A run that was started from Python may use rewards and prompts that no setting names. They must
    be in `given` or replaced by an override.

    Raises:
        SettingsError: rewards or prompts are missing.
    """
    run = next((target for target in request.targets if target.kind == "run"), None)
    if run is None:
        return
    from_python, overrides = read_run(Path(run.path)).get("given", []), request.overrides
    new_prompts = "eval_prompts" in overrides.get("data", {})
    for name, name_in_run, setting, replaced in (
        ("rewards", "rewards", "rewards", "rewards" in overrides),
        ("prompts", "eval_prompts", "data.eval_prompts", new_prompts),
    ):
        if name_in_run in from_python and name not in given and not replaced:
            raise SettingsError(
                f"{run.path}: this run was started from Python with its own {name}. Set {setting}, "
                f"or evaluate it from Python: run_evaluation(request, directory, {name}=...)."
            )


def _evaluate_chunk(
    policy: Policy,
    config: Config,
    chunk: Chunk,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    reward_batch_sizes: Mapping[str, int],
) -> Evaluation:
    evaluation = evaluate(
        policy,
        prompts,
        rewards,
        sigmas=config.sigmas(chunk.steps),
        guidance=config.eval_guidance,
        batch_size=config.sampling.batch_size,
        reward_batch_sizes=reward_batch_sizes,
        seed=chunk.seed,
        places=chunk.places,
    )
    warn_of_failures(evaluation)
    return evaluation


def _reward_batch_sizes(config: Config) -> dict[str, int]:
    return config.reward_batch_sizes


def _start_rank(request: EvaluationRequest) -> tuple[int, int]:
    """Rank and world size, after selecting the GPU and the threads of this rank."""
    rank, size, local_rank = env_rank()
    runtime = request.config.runtime
    if torch.cuda.is_available() and runtime.device != "cpu":
        torch.cuda.set_device(local_rank)
    set_threads(runtime.threads)
    return rank, size


def _unfinished(
    request: EvaluationRequest, folder: Path, own: Sequence[Chunk], metrics: Mapping[str, Reward]
) -> Iterator[tuple[Chunk, Columns | None]]:
    """The chunks to evaluate. Each comes with the columns of its earlier evaluation, or None."""
    for chunk in own:
        existing = read_chunk(folder, chunk, metrics)
        if existing is not None:
            has_images = chunk.image(folder, chunk.places[-1]).exists()
            unscored = any(np.isnan(existing[name]).any() for name in metrics)
            if (has_images or not request.keep_images) and not (request.retry_failed and unscored):
                continue
        yield chunk, existing


def _with_earlier_scores(evaluation: Evaluation, existing: Columns | None) -> Evaluation:
    """`evaluation`, where scores of an earlier evaluation replace missing scores."""
    if existing is None:
        return evaluation
    scores = {
        name: np.where(np.isnan(values), existing.get(name, values), values)
        for name, values in evaluation.scores.items()
    }
    return replace(evaluation, scores=scores)


def _progress(folder: Path, every: Sequence[Chunk]) -> Progress:
    return Progress(sum(chunk.file(folder).exists() for chunk in every), len(every))

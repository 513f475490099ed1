"""The trainer: setup of a run, the training loop, checkpoints and evaluation."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.sde import Kernel
from flowgrain.core.tree import Tree
from flowgrain.data import Prompt, as_prompts, keyed_noise, prompts_of_step
from flowgrain.distributed import init_process_group
from flowgrain.distributed.threads import set_threads
from flowgrain.methods import Method, PolicyGradient
from flowgrain.methods.calibration import CalibrationResult, calibrate
from flowgrain.models import Backbone, check_backbone
from flowgrain.rewards import Reward
from flowgrain.settings import SettingsError
from flowgrain.training import checkpoint, state
from flowgrain.training.collect import RolloutCollector, check_failed_rewards
from flowgrain.training.errors import Diverged, Interrupted, RunStopped
from flowgrain.training.evaluate import Evaluation, evaluate, interleave, sample_images
from flowgrain.training.export import export_policy
from flowgrain.training.load import (
    check_prompt_files,
    compute_device,
    load_model,
    load_prompts,
    load_rewards,
)
from flowgrain.training.optimizer import PolicyOptimizer
from flowgrain.training.policy import Policy
from flowgrain.training.recorder import EVALUATION_IMAGES, Recorder
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.setup import with_given
from flowgrain.training.signals import StopSignal
from flowgrain.training.step import train_step
from flowgrain.training.timer import StageTimer


class Trainer:
    """A run: settings, a policy, rewards and prompts, and the directory that it writes.

    Args:
        config: settings, from `load_config`.
        out: directory of the run. Default: runs/NAME.
        rewards: reward functions by name, in place of config.rewards. Their weight is 1, or that of
            config.rewards.
        prompts: training prompts, in place of data.prompts.
        eval_prompts: evaluation prompts, in place of data.eval_prompts.
        method: a method class or instance, in place of config.method.
        backbone: a backbone, in place of config.model.

    Raises:
        SettingsError: a setting cannot be used. Nothing was written.

    Example:
        >>> trainer = Trainer(load_config("demo", {"training.max_steps": 20}), "runs/mine")
        >>> trainer.train()
        >>> trainer.sample(["three green circles"])
    """

    def __init__(
        self,
        config: Config,
        out: str | Path | None = None,
        *,
        rewards: Mapping[str, Reward] | None = None,
        prompts: Sequence[str | Prompt] | None = None,
        eval_prompts: Sequence[str | Prompt] | None = None,
        method: Method | type[Method] | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        config = with_given(config, rewards, method)
        check_prompt_files(config)
        set_threads(config.runtime.threads)
        self.device = compute_device(config.runtime.device)
        self.world = init_process_group(self.device)
        self.out = Path(out) if out is not None else Path("runs") / config.name
        try:
            self.rewards, self.eval_rewards = load_rewards(config, rewards)
            self.backbone = check_backbone(backbone) if backbone else load_model(config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if config.sampling.shift == "auto":  # run.yaml records the number
            natural = self.backbone.natural_shift(config.sampling.num_steps)
            config = config.with_shift(*natural)
        self.config = config
        self.method = config.method.model_copy()  # its state belongs to this run
        self.prompts = load_prompts(
            config, self.backbone, "train", prompts, hold_out=eval_prompts is None
        )
        self.eval_prompts = load_prompts(config, self.backbone, "eval", eval_prompts)
        self.policy = Policy.for_training(config, self.backbone, self.device, self.world)
        self.optimizer = PolicyOptimizer(self.policy, config.optimizer, self.world)
        self.timer = StageTimer(self.device)
        self.collector = RolloutCollector(
            config, self.method, self.policy, self.rewards, self.prompts, self.world, self.timer
        )
        self.sigmas = self.collector.sigmas
        self.steps_done = 0
        given = {
            "rewards": rewards,
            "prompts": prompts,
            "eval_prompts": eval_prompts,
            "method": method,
            "backbone": backbone,
        }
        names = [name for name, value in given.items() if value is not None]
        self.recorder = Recorder(self.out, config, names)
        self._stop = StopSignal()

    # ------------------------------------------------------------------ the loop

    def train(self, progress: Callable[[Metrics], None] | None = None) -> list[Metrics]:
        """Train to training.max_steps. Writes metrics, images, checkpoints and the export.

        Args:
            progress: called with the metrics of every step.

        Returns:
            All metrics of the run.

        Raises:
            RunStopped: a step cannot continue. A checkpoint exists to resume from.
            Interrupted: SIGINT or SIGTERM arrived, and the current step was saved.
        """
        try:
            if self.world.is_main:
                self.recorder.start()
            self.world.gather(None)  # all ranks wait until the directory is accepted
            with self._stop.listen():
                self._loop(progress)
            self.export()
        except OSError as error:
            # With several ranks only this one knows of the error, and a checkpoint needs all of
            # them.
            saved = "the last checkpoint is unchanged" if self.world.size > 1 else self._saved()
            raise RunStopped(
                f"{saved}: {error}. Free some disk space or repair the disk, then resume with {self._resume_command}"
            ) from error
        return self.recorder.read_metrics()

    def _loop(self, progress: Callable[[Metrics], None] | None) -> None:
        config, main = self.config, self.world.is_main
        every, limit = config.evaluation.every, config.training.max_seconds
        seconds = sum(m["seconds"] for m in self.recorder.read_metrics() if "seconds" in m)
        seconds = self.world.gather(seconds)[0]
        if self.steps_done == 0 and every:
            first = {"step": 0, **self._evaluate_and_record(0)}
            if main:
                self.recorder.write_metrics(first)
        for step in range(self.steps_done + 1, config.training.max_steps + 1):
            if limit is not None and seconds >= limit:
                break  # a resumed run that already used its time
            metrics = {"step": step, **self.step(step)}
            # Rank 0's clock and any rank's signal count for all: they stop after the same step.
            ranks = self.world.gather((metrics["seconds"], self._stop.number))
            seconds += ranks[0][0]
            stop = next((number for _, number in ranks if number is not None), None)
            diverged = self.optimizer.diverged
            last = step == config.training.max_steps or (limit is not None and seconds >= limit)
            if every and (step % every == 0 or last) and not diverged:
                metrics |= self._evaluate_and_record(step)
            if main:
                self.recorder.write_metrics(metrics)
            interval = config.training.checkpoint_every
            due = bool(interval) and step % interval == 0
            if last or stop is not None or diverged or due:
                self.save(metrics)
            if progress is not None:
                progress(metrics)
            if diverged:
                raise self._diverged()
            if last:
                break
            if stop is not None:
                name = signal.Signals(stop).name
                raise Interrupted(
                    f"{name}: step {step} is finished and saved. Resume with {self._resume_command}"
                )

    def step(self, step: int) -> Metrics:
        """Run training step `step`. Returns its metrics.

        Raises:
            RunStopped: too many rewards failed. The run is saved.
        """
        try:
            if isinstance(self.method, PolicyGradient) and self.method.needs_calibration:
                self.calibrate()
            metrics, batch = train_step(step, self.config, self.collector, self.optimizer)
        except RunStopped as error:
            raise RunStopped(
                f"{error}; {self._saved()}. Resume with {self._resume_command}"
            ) from error
        if self.world.is_main:
            self.recorder.write_tree(batch)
        self.steps_done = step
        return metrics

    def calibrate(self) -> CalibrationResult:
        """Calibrate the method's noise on the current policy, and write the result to calibration.json.

        Raises:
            TypeError: the method has no stochastic steps.
        """
        if not isinstance(self.method, PolicyGradient):
            raise TypeError(f"method {self.method.name!r} has no noise to calibrate")
        result = calibrate(self.method, self.sigmas, self._score_calibration_tree)
        self.method.set_psi(result.psi)
        if self.world.is_main:
            self.recorder.write_calibration(result)
        return result

    def _score_calibration_tree(self, one: Tree, kernel: Kernel, number: int) -> Tensor:
        """Rewards [I] of calibration round `number`."""
        config, collector = self.config, self.collector
        samples, seed = config.method.calibration.samples, config.runtime.seed  # type: ignore[attr-defined]
        prompts = prompts_of_step(self.prompts, number, samples, seed)
        noise = keyed_noise(self.backbone.latent_shape, "calibrate", seed, number)
        scores = collector.score_tree(one, prompts, kernel, noise).scores
        check_failed_rewards(scores, config.training.max_failed_rewards)
        weights = collector.reward_weights
        return torch.stack([weights[name] * s.values for name, s in scores.items()]).sum(0)

    # ------------------------------------------------------------------ checkpoints

    def save(self, metrics: Metrics | None) -> Path:
        """Write a checkpoint of everything that the next step depends on.

        The metrics' evaluation is its score.
        """
        return state.save(self, metrics)

    def restore(self) -> list[str]:
        """Load the last good checkpoint of this run's directory, if there is one.

        Returns:
            A message per damaged checkpoint that was skipped.

        Raises:
            SettingsError: a setting that a run must keep has changed.
            CheckpointError: all checkpoints are damaged.
        """
        return state.restore(self)

    def resume(self) -> list[str]:
        """Like `restore`, and discard the files of later steps, so that `train` continues from there.

        Raises:
            RunStopped: the directory cannot be written. Nothing is lost.
        """
        try:
            return state.resume(self)
        except OSError as error:
            raise RunStopped(
                f"the run in {self.out} cannot be resumed yet: {error}. Nothing is lost. Free some disk space or repair the "
                f"disk, then resume with {self._resume_command}"
            ) from error

    def export(self) -> Path:
        """Write the parameters to export/ in the format of diffusers or of its LoRA loaders.

        Returns the directory.
        """
        export_policy(self.policy, self.out / "export")
        return self.out / "export"

    def _saved(self) -> str:
        """Make sure that a checkpoint contains the current parameters, and say where."""
        newest = self.out / "checkpoints" / f"step-{self.steps_done:06d}"
        try:
            exists = self.world.gather(newest.exists())[0]
            return f"the run is saved in {newest if exists else self.save(None)}"
        except (OSError, checkpoint.CheckpointError) as error:
            return f"the last steps could not be saved ({error})"

    @property
    def _resume_command(self) -> str:
        return f"flowgrain train --resume {self.out}"

    def _diverged(self) -> Diverged:
        settings = self.config.optimizer
        return Diverged(
            f"{self.optimizer.skipped_in_a_row} updates in a row had a non-finite loss or gradient and were skipped "
            f"(optimizer.max_skipped_updates={settings.max_skipped_updates}). Try a smaller learning rate than "
            f"{settings.learning_rate:g}: {self._resume_command} optimizer.learning_rate={settings.learning_rate / 3:g}"
        )

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self, num_steps: int | None = None, prompts: Sequence[str | Prompt] | None = None
    ) -> Evaluation:
        """Sample an image for each prompt with the EMA parameters, and score it by every reward.

        Args:
            num_steps: ODE steps. Default: evaluation.num_steps.
            prompts: default: evaluation.num_prompts of the held-out prompts. They repeat with other
                noise if there are fewer.
        """
        config, world = self.config, self.world
        if prompts is None:
            count, available = config.evaluation.num_prompts, self.eval_prompts
            prompts = [available[i % len(available)] for i in range(count)]
        chosen, assigned = as_prompts(prompts), world.assign(len(prompts))
        evaluation = evaluate(
            self.policy,
            [chosen[i % len(chosen)] for i in assigned],
            self.eval_rewards,
            sigmas=config.sigmas(num_steps or config.evaluation.num_steps),
            guidance=config.eval_guidance,
            batch_size=config.sampling.batch_size,
            reward_batch_sizes={
                r.name: r.batch_size for r in (*config.evaluation.rewards, *config.rewards)
            },
            places=assigned.tolist(),
        )
        if world.size == 1:
            return evaluation
        # Ranks exchange the images that are recorded, not gigabytes.
        shown = replace(evaluation, images=evaluation.images[: -(-EVALUATION_IMAGES // world.size)])
        return interleave(world.gather(shown), chosen)

    def sample(self, prompts: Sequence[str], num_steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [I, 3, H, W] in 0..1 of `prompts`, by the ODE with the EMA parameters."""
        steps = num_steps or self.config.evaluation.num_steps
        return sample_images(self.policy, self.config, prompts, steps, seed)

    def _evaluate_and_record(self, step: int) -> Metrics:
        evaluation = self.evaluate()
        if self.world.is_main:
            self.recorder.write_evaluation(step, evaluation)
        values = evaluation.means() | evaluation.part_means()
        return {f"eval/{name}": value for name, value in values.items()}

"""The trainer: a run with its policy, rewards, prompts and files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.data import Prompt
from flowgrain.distributed import init_process_group
from flowgrain.distributed.threads import set_threads
from flowgrain.methods import Method, PolicyGradient
from flowgrain.methods.calibration import CalibrationResult
from flowgrain.models import Backbone, check_backbone
from flowgrain.records.evaluations import EVALUATION_IMAGES
from flowgrain.records.history import History
from flowgrain.records.run_lock import RunLock
from flowgrain.rewards import Reward
from flowgrain.settings import SettingsError
from flowgrain.training import state
from flowgrain.training.collect import RolloutCollector
from flowgrain.training.errors import RunStopped
from flowgrain.training.evaluate import Evaluation, evaluate_on_ranks, sample_images
from flowgrain.training.export import export_policy
from flowgrain.training.fit import check_loaded, check_memory, check_start
from flowgrain.training.load import (
    compute_device,
    load_empty,
    load_prompts,
    load_rewards,
)
from flowgrain.training.loop import run_steps, what_is_kept
from flowgrain.training.optimizer import PolicyOptimizer
from flowgrain.training.policy import Policy
from flowgrain.training.recorder import Recorder
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.run_files import resume_command
from flowgrain.training.setup import with_given
from flowgrain.training.signals import StopSignal
from flowgrain.training.sizes import size_before_loading
from flowgrain.training.step import train_step
from flowgrain.training.timer import StageTimer
from flowgrain.training.watch import Watch

Progress = Callable[[Metrics], None]
"""Called with the metrics of a step."""
Start = Callable[[], None]
"""Called before the first step."""


class Trainer:
    """A run: settings, a policy, rewards and prompts, and the directory that it writes.

    Args:
        config: settings, from `load_config`.
        out: directory of the run. Default: runs/NAME.
        rewards: reward functions by name, in place of config.rewards. A name that is in
            config.rewards keeps its weight and batch size. Other rewards have weight 1.
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
        objects: dict[str, object] = {"rewards": rewards, "prompts": prompts}
        objects |= {"eval_prompts": eval_prompts, "method": method, "backbone": backbone}
        given = [name for name, value in objects.items() if value is not None]
        config = with_given(config, rewards, method)
        check_start(config, given)
        set_threads(config.runtime.threads)
        self.device = compute_device(config.runtime.device)
        self.world = init_process_group(self.device, config.runtime.context_parallel)
        self.out = Path(out) if out is not None else Path("runs") / config.name
        check_memory(config, None if backbone else size_before_loading(config), self.device)
        try:
            self.rewards, self.eval_rewards = load_rewards(config, rewards)
            self.backbone = check_backbone(backbone) if backbone else load_empty(config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.size = check_loaded(config, self.backbone, self.device)
        self.config = config = config.resolved(self.backbone)  # run.yaml records the numbers
        self.method = config.method.model_copy(deep=True)  # state of this run only
        self.prompts = load_prompts(
            config, self.backbone, "train", prompts, hold_out=eval_prompts is None
        )
        self.eval_prompts = load_prompts(config, self.backbone, "eval", eval_prompts)
        self.policy = Policy.for_training(config, self.backbone, self.device, self.world)
        self.optimizer = PolicyOptimizer(self.policy, config, self.world)
        self.watch = Watch(config, self.policy, self.out)
        self.timer = StageTimer(self.device)
        self.collector = RolloutCollector(
            config, self.method, self.policy, self.rewards, self.prompts, self.world, self.timer
        )
        self.sigmas = self.collector.sigmas
        self.steps_done = 0
        self.recorder = Recorder(self.out, config, given)
        self.lock = RunLock(self.out)
        self._stop = StopSignal()

    def train(self, progress: Progress | None = None, start: Start | None = None) -> list[Metrics]:
        """Train to training.max_steps, and write metrics, images, checkpoints and the export.

        Args:
            progress: called with the metrics of every step.
            start: called on the main rank after the files of the run were created.

        Returns:
            All metrics of the run.

        Raises:
            SettingsError: another process trains in this directory, or it contains another run.
            RunStopped: the run cannot continue. It can be resumed from a checkpoint.
            Interrupted: SIGINT or SIGTERM arrived. The run is saved.
        """
        try:
            self.world.on_main(lambda: state.begin(self, start))
            kept = partial(what_is_kept, self) if self.world.is_main else None
            with self._stop.listen(kept):
                run_steps(self, self._stop, progress)
            state.finish(self)
        except OSError as error:
            raise state.stopped_by_disk(self, error) from error
        finally:
            self.collector.source.close()
            self.recorder.close()
            self.lock.release()
        return self.recorder.read_metrics()

    def step(self, step: int) -> Metrics:
        """Run training step `step`, and return its metrics.

        Raises:
            RunStopped: too many rewards failed. The run is saved.
            Diverged: too many images contain NaN or infinity. The step is not saved.
        """
        try:
            if isinstance(self.method, PolicyGradient) and self.method.needs_calibration:
                self.calibrate()
            metrics, batch = train_step(step, self.config, self.collector, self.optimizer)
        except RunStopped as error:
            raise state.stopped(self, step, error) from error
        self.steps_done = step  # before files are written, so that an error saves this step
        if self.world.is_main:
            self.recorder.write_groups(batch, self.sigmas.tolist())
        return metrics

    def calibrate(self) -> CalibrationResult:
        """Calibrate the method's noise on the current policy, and write calibration.json.

        Raises:
            TypeError: the method has no stochastic steps.
            RunStopped: too many rewards failed.
        """
        result = self.collector.calibrate()
        if self.world.is_main:
            self.recorder.write_calibration(result)
        return result

    def save(self, metrics: Metrics | None) -> Path:
        """Write a checkpoint of everything that the next step depends on.

        The evaluation in `metrics`, if any, decides which checkpoint is the best.
        """
        return state.save(self, metrics)

    def restore(self) -> list[str]:
        """Load the last good checkpoint of this run's directory, if there is one.

        Returns:
            A message for each damaged checkpoint that was skipped.

        Raises:
            SettingsError: a setting that the run must keep has changed.
            CheckpointError: all checkpoints are damaged.
        """
        return state.restore(self)

    def resume(self) -> list[str]:
        """Like `restore`, but also delete the files of later steps, so that `train` can continue.

        The directory is locked until `train` ends. Metrics are those of the checkpoint. Damaged
        records are set aside, and a message for each is returned.

        Raises:
            SettingsError: the directory is locked, or its checkpoints are gone.
            RunStopped: the directory cannot be written. Nothing is lost.
        """
        return state.resume(self)

    def export(self, folder: Path | None = None) -> Path:
        """Write the parameters for diffusers to `folder`, by default export/. Returns `folder`."""
        export_policy(self.policy, folder or self.out / "export")
        return folder or self.out / "export"

    @property
    def history(self) -> History:
        """The metrics of the run so far, as columns."""
        return History(self.recorder.read_metrics())

    @property
    def resume_command(self) -> str:
        """How to resume this run: a command, or Python for a run with custom objects."""
        return resume_command(self.out, self.recorder.given)

    def evaluate(
        self,
        num_steps: int | None = None,
        prompts: Sequence[str | Prompt] | None = None,
        num_images: int | None = None,
    ) -> Evaluation:
        """Sample an image for each prompt with the EMA parameters, and score it by every reward.

        Args:
            num_steps: ODE steps. Default: evaluation.num_steps.
            prompts: prompts to evaluate. Default: the held-out prompts, which are repeated with
                other noise if there are fewer than `num_images`.
            num_images: images without `prompts`. Default: evaluation.num_prompts.
        """
        config = self.config
        if prompts is None:
            count, available = num_images or config.evaluation.num_prompts, self.eval_prompts
            prompts = [available[i % len(available)] for i in range(count)]
        steps, kept = num_steps or config.evaluation.num_steps, EVALUATION_IMAGES
        parts = (self.policy, config, prompts, self.eval_rewards)
        return evaluate_on_ranks(*parts, num_steps=steps, num_images=kept, net=self.watch.net)

    def sample(self, prompts: Sequence[str], num_steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [I, 3, H, W] in 0..1 of `prompts`, by the ODE with the EMA parameters."""
        steps = num_steps or self.config.evaluation.num_steps
        return sample_images(self.policy, self.config, prompts, steps, seed)

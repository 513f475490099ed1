"""A run, and its training step read top to bottom.

Letters: P prompts of a step, N rows of the tree, E trained edges, I images, M rewards, *L latent.
"""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowgrain.methods import algorithms
from flowgrain.training import checkpoint
from flowgrain.core import credit
from flowgrain.methods.algorithms import Method, plan_tree
from flowgrain.models import Backbone, Conditioning, Source, load_backbone, take
from flowgrain.methods.calibration import Calibration, calibrate, needs_calibration
from flowgrain.training.evaluate import Evaluation, decode, draw, evaluate, joined
from flowgrain.training.forward_process import contrast
from flowgrain.core.objective import EdgeLoss, Edges, ForwardProcess
from flowgrain.distributed.mesh import join, reduce_gradients_now, whole
from flowgrain.training.policy import Policy, compute_device, load_dtypes
from flowgrain.distributed.process import set_threads
from flowgrain.data import keyed_noise, prompts_of_step, read_prompts
from flowgrain.training.recorder import SHOWN, Record
from flowgrain.rewards import OF_SHAPES, Reward, RewardSource, Scores, Scoring, load_reward
from flowgrain.core.rollout import Noise, Rollout, Tail, rollout
from flowgrain.core.rollout import join as join_rollouts
from flowgrain.training.rollout_batch import Metrics, Sampled
from flowgrain.core.sde import CalibratedSDE, Gaussian, Kernel, Step
from flowgrain.config.schema import FIXED, Settings, SettingsError, existing_file
from flowgrain.core.tree import Ints, Tree, split_updates


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why and how to resume."""


class Diverged(RunStopped):
    """Several updates in a row were not finite."""


class Interrupted(RunStopped):
    """SIGINT or SIGTERM: the step was finished and saved."""


class Run:
    """A run: settings, a policy, rewards and prompts, and a folder that it writes.

    >>> run = Run(recipe("demo", max_steps=20), out="runs/mine", rewards={"mine": my_reward})
    >>> run.train(); run.evaluate(); run.sample(["three green circles"])

    rewards: own reward functions by name, weight 1, instead of the settings' (a name in the settings keeps its weight).
    prompts, eval_prompts: lists instead of the settings' files. method, backbone: instead of those the settings name.
    Raises SettingsError before any work for whatever cannot be run.
    """

    def __init__(
        self,
        settings: Settings,
        out: str | Path | None = None,
        *,
        rewards: Mapping[str, Reward] | None = None,
        prompts: Sequence[str] | None = None,
        eval_prompts: Sequence[str] | None = None,
        method: Method | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        if rewards is not None:
            weights = {name: settings.rewards.get(name, 1.0) for name in rewards}
            settings = Settings.model_validate({**settings.model_dump(), "rewards": weights})
        self.settings = s = settings
        set_threads(s.threads)
        self.device = compute_device(s.device)
        self.group = join(self.device)
        self.out = Path(out) if out is not None else Path("runs") / s.name
        for setting, path in (("prompts", s.prompts), ("eval_prompts_file", s.eval_prompts_file)):
            if path is not None:
                existing_file(setting, path)  # before a large model is loaded
        try:
            self.rewards, self.eval_rewards = load_rewards(s, rewards)
            self.backbone = backbone or load_model(s)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if s.shift == "auto":  # from here on a number, which run.yaml then records
            self.settings = s = s.with_natural_shift(*self.backbone.natural_shift(s.num_steps))
        self.method = method or algorithms.build(s)
        self.prompts = load_prompts(s, self.backbone, "train", prompts)
        self.eval_prompts = load_prompts(s, self.backbone, "eval", eval_prompts)
        keeps_old = self.method.forward_process is not None
        self.policy = Policy(self.backbone, s, self.device, keep_old=keeps_old, group=self.group)
        self.optimizer = torch.optim.AdamW(  # fused: without whole copies of the weights on the way
            self.policy.trained.values(), lr=s.learning_rate, betas=s.adam_betas, weight_decay=s.weight_decay, fused=True
        )
        self.sigmas = s.grid().to(self.device)
        self.steps_done = 0
        self.skipped_in_a_row = 0
        own = {"rewards": rewards, "prompts": prompts, "eval_prompts": eval_prompts, "method": method, "backbone": backbone}
        self.record = Record(self.out, s, [name for name, value in own.items() if value is not None])
        self._calibrated = method is not None or not needs_calibration(s)
        self._stop_signal: int | None = None
        self._spent: defaultdict[str, float] = defaultdict(float)

    # ------------------------------------------------------------------ the step

    def step(self, step: int) -> Metrics:
        """One training step: sample, score, give credit, update. Returns the step's metrics.

        Raises RunStopped, before anything is updated, if too many rewards failed.
        """
        begin = time.perf_counter()
        self._spent.clear()
        if not self._calibrated:
            self.calibrate()
        sampled = self.sample_tree(step)
        self._stop_if_rewards_fail(sampled.scores)
        process = self.method.forward_process
        with self._timed("update"):
            metrics = self.update(sampled) if process is None else self._contrast(sampled, process)
        for name, scores in sampled.scores.items():
            metrics[f"reward/{name}"] = float(scores.values.nanmean())
            metrics[f"failed/{name}"] = scores.failed
        metrics["advantage/std"] = float(sampled.advantage.std())
        metrics["advantage/zero"] = float((sampled.advantage == 0).float().mean())
        metrics |= {"forward_passes": sampled.result.forward_passes * self.group.size, "decodes": len(sampled.whole.leaves)}
        metrics |= {"seconds": time.perf_counter() - begin, **self._spent}
        values = {name: scores.values for name, scores in sampled.scores.items()}
        if self.group.first:
            self.record.keep_tree(
                step, sampled.whole, sampled.prompts[0], sampled.images, values, sampled.credited, sampled.advantage
            )
        return metrics

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Adds the time inside to the step's "seconds/stage"; on a GPU it waits for what was asked of it there."""
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._spent[f"seconds/{stage}"] += time.perf_counter() - begin

    def sample_tree(self, step: int) -> Sampled:
        """Grows the tree of step `step` for its prompts, scores its images and gives every trained edge its advantage."""
        s = self.settings
        prompts = prompts_of_step(self.prompts, step, s.prompts_per_step, s.seed)
        one = plan_tree(self.method, s, step)
        noise = keyed_noise(self.backbone.latent_shape, "train", s.seed, step)
        cond, result, images, scores = self._grow(one, prompts, self.method.kernel, noise)
        tree = one.repeat(len(prompts))
        how = credit.Normalisation(s.std_scope, s.std_unbiased, s.std_epsilon, s.peers)
        values = {name: found.values for name, found in scores.items()}
        advantage = credit.mix(self.method.credit, tree, values, s.rewards, how, s.reward_mix, s.advantage_clip)
        weight = credit.extremes(advantage, how.groups(tree), s.best_of) if s.best_of else torch.ones_like(advantage)
        credited = tree.edges if self.method.forward_process is None else tree.leaves
        return Sampled(step, prompts, tree, self.group, cond, result, images, scores, credited, advantage, weight)

    def _grow(
        self, one: Tree, prompts: list[str], kernel: Kernel, noise: Noise
    ) -> tuple[Conditioning, Rollout, Tensor, dict[str, Scores]]:
        """Fills the tree `one` for the prompts dealt to this process, decodes the leaves and scores them by every trained reward.

        The prompts go `prompts_per_rollout` at a time; while one part is sampled, the rewards of those before it are computed.
        The scores are those of all `prompts`, also where other processes have them.
        """
        s = self.settings
        dealt = self.group.deal(len(prompts))
        mine = [prompts[i % len(prompts)] for i in dealt]
        with self._timed("encode"):
            cond = self.policy.encode(mine)
        model = self.policy.sample_velocity if self.policy.old is None else self.policy.old_velocity
        size = s.prompts_per_rollout or len(mine)
        results, images = [], []
        with Scoring(self.rewards, s.reward_batch, background=size < len(mine)) as scoring:
            for first in range(0, len(mine), size):
                part = one.repeat(len(mine[first : first + size]))

                def velocity(x: Tensor, sigma: Tensor, prompt: Tensor, first: int = first) -> Tensor:
                    return model(x, sigma, take(cond, first + prompt), s.guidance_scale)

                def own_noise(prompt: Ints, draw: Ints, first: int = first) -> Tensor:
                    return noise(dealt[first + prompt], draw)

                @contextmanager
                def tail(first: int = first) -> Iterator[Tail]:
                    with self.policy.tail() as finish:
                        yield lambda x, sigma, prompt, follows: finish(
                            x, sigma, take(cond, first + prompt), s.guidance_scale, follows
                        )

                with self._timed("sample"):
                    results.append(
                        rollout(part, velocity, kernel, self.sigmas, own_noise, s.rows_per_pass, tail=tail, tails=s.order_of_tails)
                    )
                with self._timed("decode"):
                    images.append(decode(self.policy, results[-1].at(part.leaves), s.rows_per_pass))
                with self._timed("score"):  # or, where rewards work in the background, the wait for them
                    scoring.ask(images[-1], [mine[first + p] for p in part.prompt[part.leaves]])
            with self._timed("score"):
                scores = scoring.answers()
        result = results[0] if len(results) == 1 else join_rollouts(one.repeat(len(mine)), results)
        return cond, result, torch.cat(images), self._scores_of_all(scores, len(prompts), len(dealt))

    def _scores_of_all(self, scores: dict[str, Scores], count: int, dealt: int) -> dict[str, Scores]:
        """The scores of the images of all `count` prompts, in their order, of those that each process has for its `dealt` ones."""
        every = self.group.collect({name: (found.values, found.reason) for name, found in scores.items()})
        of_all = {}
        for name in scores:
            values = self.group.undeal([found[name][0].reshape(dealt, -1) for found in every], count).flatten()
            reason = next((found[name][1] for found in every if found[name][1]), None)
            of_all[name] = Scores(values, int(values.isnan().sum()), reason)
        return of_all

    def calibrate(self) -> Calibration:
        """Finds psi on the policy as it is, once, takes it as the run's noise and writes it to `calibration.json`."""
        s = self.settings

        def grow(one: Tree, kernel: Kernel, number: int) -> Tensor:
            prompts = prompts_of_step(self.prompts, number, s.calibration_samples, s.seed)
            noise = keyed_noise(self.backbone.latent_shape, "calibrate", s.seed, number)
            scores = self._grow(one, prompts, kernel, noise)[3]
            self._stop_if_rewards_fail(scores)
            return torch.stack([s.rewards[name] * found.values for name, found in scores.items()]).sum(0)

        found = calibrate(s, grow)
        self._take_psi(found.psi)
        if self.group.first:
            self.record.keep_calibration(found)
        return found

    def _take_psi(self, psi: Sequence[float]) -> None:
        self.method = algorithms.build(self.settings.model_copy(update={"psi": tuple(psi)}))
        self._calibrated = True

    def update(self, sampled: Sampled) -> Metrics:
        """The optimizer steps of one rollout: in each one gradient forward per distinct parent, losses summed / global count."""
        s, tree = self.settings, sampled.whole
        shares = split_updates(tree, s.updates_per_rollout)
        passes = [sampled.passes(share, s.train_rows_per_pass or s.rows_per_pass) for share in shares]
        old = [None if number == 0 else [self._old_law(sampled, p) for p, _ in share] for number, share in enumerate(passes)]
        losses: list[EdgeLoss] = []
        norms, skipped, later = [], 0, []
        for number, (share, of_share) in enumerate(zip(shares, passes, strict=True)):
            count = int(np.isin(tree.parent[tree.edges], share).sum())
            done = []
            for place, (parents, counts) in enumerate(of_share):
                reduce_gradients_now(self.policy.transformer, place == len(of_share) - 1)
                # Before the first update the policy is the one that sampled, so its own law is the old one.
                law = old[number]
                edge_loss = self._edge_loss(sampled, parents, law[place] if law else None, counts)
                (edge_loss.loss.sum() / count).backward()
                if counts:
                    done.append(EdgeLoss(*(value.detach() for value in vars(edge_loss).values())))
            losses += done
            later += done if number else []
            norm, was_skipped = self.optimise([part.loss for part in done])
            norms.append(norm)
            skipped += was_skipped
        values = {name: [getattr(part, name) for part in losses] for name in ("loss", "ratio", "clipped", "kl")}
        found = self._mean_of_all({**values, "clipped later": [part.clipped for part in later]})
        gradient = sum(len(share) for share in shares)
        metrics: Metrics = {
            "loss": found["loss"],
            "ratio/mean": found["ratio"],
            "ratio/max": max(self.group.collect(max((float(part.ratio.max()) for part in losses), default=-math.inf))),
            "clip_fraction": found["clipped"],
            "grad_norm": float(torch.stack(norms).mean()),
            "updates": len(shares),
            "updates/skipped": skipped,
            "train_forward_passes": gradient,
            "frozen_forward_passes": gradient - len(shares[0]) + (gradient if s.kl_weight else 0),
        }
        if len(shares) > 1:  # the clip can only bite where the policy has moved on from the one that sampled
            metrics["clip_fraction/later_updates"] = found["clipped later"]
        if s.kl_weight:
            metrics["kl"] = found["kl"]
        return metrics

    def _mean_of_all(self, values: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """The mean of each name's values over all processes."""
        mine = {name: (sum(float(v.double().sum()) for v in of_name), sum(map(len, of_name))) for name, of_name in values.items()}
        every = self.group.collect(mine)
        return {name: sum(one[name][0] for one in every) / max(sum(one[name][1] for one in every), 1) for name in mine}

    def _contrast(self, sampled: Sampled, process: ForwardProcess) -> Metrics:
        return contrast(self.settings, self.policy, self.sigmas, sampled, process, self.optimise, self._mean_of_all)

    def optimise(self, losses: list[Tensor]) -> tuple[Tensor, bool]:
        """Takes the optimizer step of the gradients at hand unless they or `losses` are not finite. Returns norm, if skipped."""
        parameters = list(self.policy.trained.values())
        self.group.sum_gradients(parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        finite = bool(torch.isfinite(norm)) and all(bool(loss.isfinite().all()) for loss in losses)
        broken = self.group.any(not finite)
        if not broken:
            self.optimizer.step()
            self.policy.updated()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if broken else 0
        self.optimizer.zero_grad(set_to_none=True)
        return norm, broken

    def _edge_loss(self, sampled: Sampled, parents: Ints, old: Gaussian | None, counts: bool = True) -> EdgeLoss:
        """The loss of every trained edge that leaves `parents`, [E]; one gradient forward serves all edges of a parent."""
        law, edges, step = self._law(sampled, parents, self.policy.train_velocity)
        following = sampled.result.at(edges)
        reference = None
        if self.settings.kl_weight:
            reference = self._law(sampled, parents, self.policy.reference_velocity)[0]
        place = torch.from_numpy(np.searchsorted(sampled.credited, sampled.there(edges))).clamp(max=len(sampled.credited) - 1)
        advantage, weight = (of_edge[place].to(self.device) for of_edge in (sampled.advantage, sampled.weight))
        if old is None:
            old = Gaussian(law.mean.detach(), law.std)
        found = self.method.objective(Edges(law, old, following, advantage, step, reference))
        return replace(found, loss=found.loss * weight * counts)

    @torch.no_grad()
    def _old_law(self, sampled: Sampled, parents: Ints) -> Gaussian:
        """The policy before the first update, by the very forward whose gradient is taken later: the ratio is exactly 1."""
        return self._law(sampled, parents, self.policy.train_velocity)[0]

    def _law(self, sampled: Sampled, parents: Ints, velocity: Callable[..., Tensor]) -> tuple[Gaussian, Ints, Step]:
        """p(x_next | x) of the trained edges leaving `parents` under `velocity`, those edges [E], and their steps."""
        tree = sampled.result.tree
        edges = tree.edges[np.isin(tree.parent[tree.edges], parents)]
        source = torch.from_numpy(np.searchsorted(parents, tree.parent[edges])).to(self.device)
        x = sampled.result.at(parents)
        prompt = torch.from_numpy(tree.prompt[parents]).to(self.device)
        sigma = self.sigmas[torch.from_numpy(tree.level[parents]).to(self.device)]
        v = velocity(x, sigma, take(sampled.cond, prompt), self.settings.guidance_scale)
        start, end = (torch.from_numpy(level).to(self.device) for level in (tree.level[tree.parent[edges]], tree.level[edges]))
        step = Step.on(self.sigmas, start, end)
        return self.method.kernel(x[source], v[source], step), edges, step

    def _stop_if_rewards_fail(self, found: Mapping[str, Scores]) -> None:
        allowed = self.settings.max_failed_rewards
        for name, scores in found.items():
            if scores.failed > allowed * len(scores.values):
                raise RunStopped(
                    f"reward {name!r} failed on {scores.failed} of {len(scores.values)} images ({scores.reason}), more than "
                    f"max_failed_rewards={allowed:g} allows"
                )

    # ------------------------------------------------------------------ the loop

    def train(self, progress: Callable[[Metrics], None] | None = None, report: bool = True) -> list[Metrics]:
        """Trains to `max_steps`, writing metrics, images, checkpoints, the export and, unless told not to, the report.

        Returns all metrics. progress is called with the metrics of every step. A step that cannot go on raises RunStopped, SIGINT
        and SIGTERM raise Interrupted after the step in hand; in both cases a checkpoint is there to resume from.
        """
        self._stop_signal = None
        try:
            if self.group.first:
                self.record.start()
            self.group.collect(None)  # nobody works on while the folder may still be refused
            with self._signals():
                self._train(progress)
            self.export()
            if report and self.group.first:
                self.report()
        except OSError as error:
            # Where several processes run, only this one knows of it, and a checkpoint takes all.
            saved = self._saved(None) if self.group.size == 1 else "the last checkpoint is as it was"
            raise RunStopped(f"{saved}: {error}; free some space or mend the disk, then resume with {self._resume()}") from error
        return self.record.read()

    def _train(self, progress: Callable[[Metrics], None] | None) -> None:
        """The loop itself. Raises RunStopped and Interrupted."""
        s = self.settings
        spent = sum(line["seconds"] for line in self.record.read() if "seconds" in line)
        spent = self.group.collect(spent)[0]
        if self.steps_done == 0 and s.eval_every:
            first = {"step": 0, **self._evaluate_and_keep(0)}
            if self.group.first:
                self.record.metrics(first)
        for step in range(self.steps_done + 1, s.max_steps + 1):
            if s.max_seconds is not None and spent >= s.max_seconds:
                break  # a resumed run that had already used up its time
            try:
                metrics = {"step": step, **self.step(step)}
            except RunStopped as stopped:
                raise RunStopped(f"{stopped}; {self._saved(None)}; resume with {self._resume()}") from stopped
            self.steps_done = step
            # The first process's clock and anybody's signal count for all: they stop after the same step.
            every = self.group.collect((metrics["seconds"], self._stop_signal))
            spent += every[0][0]
            stop_signal = next((number for _, number in every if number is not None), None)
            stopping, broken = stop_signal is not None, self.skipped_in_a_row >= s.max_skipped_updates
            last = step == s.max_steps or (s.max_seconds is not None and spent >= s.max_seconds)
            if s.eval_every and (step % s.eval_every == 0 or last) and not broken:
                metrics |= self._evaluate_and_keep(step)
            if self.group.first:
                self.record.metrics(metrics)
            if last or stopping or broken or (s.checkpoint_every and step % s.checkpoint_every == 0):
                self.save(metrics)
            if progress is not None:
                progress(metrics)
            if broken:
                raise Diverged(
                    f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient and were skipped "
                    f"(max_skipped_updates={s.max_skipped_updates}); try a smaller learning_rate than {s.learning_rate:g}: "
                    f"{self._resume()} learning_rate={s.learning_rate / 3:g}"
                )
            if last:
                break
            if stopping:
                name = signal.Signals(stop_signal or 0).name
                raise Interrupted(f"{name}: step {step} is finished and saved; resume with {self._resume()}")

    def _saved(self, metrics: Metrics | None) -> str:
        """Makes sure that the weights as they are now are in a checkpoint, and says where."""
        newest = self.out / "checkpoints" / f"step-{self.steps_done:06d}"
        try:
            there = self.group.collect(newest.exists())[0]
            return f"the run is saved in {newest if there else self.save(metrics)}"
        except (OSError, checkpoint.CheckpointError) as error:
            return f"the last steps could not be saved ({error})"

    def _resume(self) -> str:
        return f"flowgrain train --resume {self.out}"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM only asks for a stop after the step; a second one acts as it always does."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self._stop_signal = number
            for which, handler in before.items():
                signal.signal(which, handler)

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: signals are the caller's business
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save(self, metrics: Metrics | None) -> Path:
        """Writes a checkpoint of everything that the next step depends on."""
        plain = {
            "step": self.steps_done,
            "settings": self.settings.model_dump(mode="json"),
            "policy": self.policy.plain(),
            "psi": list(self.method.kernel.psi) if isinstance(self.method.kernel, CalibratedSDE) and self._calibrated else None,
            "stepped": [name for name, p in self.policy.trained.items() if self.optimizer.state.get(p)],
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        score = None
        if metrics is not None:
            names = [f"eval/{name}" for name in self.settings.rewards if f"eval/{name}" in metrics]
            score = sum(self.settings.rewards[n.removeprefix("eval/")] * metrics[n] for n in names) if names else None
        tensors = {**self.policy.tensors(), **self._optimizer_tensors()}
        keep = self.settings.keep_checkpoints
        return checkpoint.save(self.out / "checkpoints", self.steps_done, tensors, plain, score, keep, self.group)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state by name, itself and no copy."""
        return {
            f"optimizer.{kind}.{name}": value
            for name, parameter in self.policy.trained.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self) -> list[str]:
        """Takes the state of the last good checkpoint of this run's folder, if there is one. Returns what was found damaged.

        Settings that may change on a resume (learning_rate, say) keep this run's values. Raises SettingsError for one that
        may not, CheckpointError if there are checkpoints and none is good.
        """
        path, state, damaged = checkpoint.load_last_good(self.out / "checkpoints", self.group)
        if path is None:
            return damaged
        s = self.settings
        saved = {**s.model_dump(mode="json"), **state["settings"]}
        now = s.model_dump(mode="json")
        for name in FIXED:
            if saved[name] != now[name]:
                raise SettingsError(
                    f"{name}={now[name]}: the run in {self.out} has {name}={saved[name]} and must keep it; start a new run"
                )
        if (saved["ema_decay"] > 0) != (s.ema_decay > 0):
            raise SettingsError(
                f"ema_decay={s.ema_decay}: the run in {self.out} has {saved['ema_decay']}; EMA can't be turned on or off"
            )
        for name in state["stepped"]:  # the others had no gradient yet
            parameter = self.policy.trained[name]
            zeros = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        checkpoint.read(path, {**self.policy.tensors(), **self._optimizer_tensors()}, self.group)
        self.policy.restored(state["policy"])
        if state["psi"] is not None:
            self._take_psi(state["psi"])
        self.steps_done = state["step"]
        skipped = state["skipped_in_a_row"]
        self.skipped_in_a_row = skipped if skipped < s.max_skipped_updates else 0  # whoever resumes after that stop means it
        return damaged

    def resume(self) -> list[str]:
        """Like `restore`, and makes ready to go on from there: what the folder holds of later steps is dropped or set aside.

        Raises RunStopped, with everything still there, if the folder cannot be written.
        """
        try:
            if self.group.first:
                checkpoint.mend(self.out / "checkpoints")
            self.group.collect(None)
            damaged = self.restore()
            if self.group.first:
                for path in checkpoint.checkpoints(self.out / "checkpoints"):
                    if int(path.name.removeprefix("step-")) > self.steps_done:
                        checkpoint.set_aside(path)
                self.record.forget_after(self.steps_done)
        except OSError as error:
            raise RunStopped(
                f"the run in {self.out} cannot be resumed yet: {error}; nothing is lost: free some space or mend the disk, then "
                f"resume with {self._resume()}"
            ) from error
        return damaged

    def export(self) -> Path:
        """Writes the weights to `export/` in the format of diffusers (full) or of its LoRA loaders. Returns the folder."""
        self.policy.export(self.out / "export")
        return self.out / "export"

    # ------------------------------------------------------------------ looking at it

    def report(self) -> Path:
        """Writes report.html. Returns its path."""
        from flowgrain.report import write_report  # matplotlib and the template are needed by no training step

        return write_report(self.out)

    def evaluate(self, num_steps: int | None = None, prompts: Sequence[str] | None = None) -> Evaluation:
        """Scores an image of each of `prompts` at `num_steps` ODE steps, by every reward.

        Default: the settings' `eval_num_steps`, and as many of the held-out prompts as its `eval_prompts`; beyond their
        number they are taken again with other noise.
        """
        s, group = self.settings, self.group
        if prompts is None:
            prompts = [self.eval_prompts[i % len(self.eval_prompts)] for i in range(s.eval_prompts)]
        dealt = group.deal(len(prompts))
        found = evaluate(
            self.policy,
            [prompts[i % len(prompts)] for i in dealt],
            self.eval_rewards,
            sigmas=s.grid(num_steps or s.eval_num_steps),
            guidance=s.eval_guidance,
            rows_per_pass=s.rows_per_pass,
            reward_batch=s.reward_batch,
            places=dealt.tolist(),
        )
        if group.size == 1:
            return found
        shown = replace(found, images=found.images[: -(-SHOWN // group.size)])  # what the record keeps, not gigabytes
        return joined(group.collect(shown), list(prompts))

    def sample(self, prompts: Sequence[str], num_steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [I, 3, H, W] in 0..1, one for each of `prompts`, by ODE with the averaged weights."""
        return draw(self.policy, self.settings, prompts, num_steps or self.settings.eval_num_steps, seed)

    def _evaluate_and_keep(self, step: int) -> Metrics:
        evaluation = self.evaluate()
        if self.group.first:
            self.record.keep_evaluation(step, evaluation)
        metrics: Metrics = {f"eval/{name}": value for name, value in evaluation.means().items()}
        return metrics | {f"eval/{name}": value for name, value in evaluation.part_means().items()}


def load_model(s: Settings, train: bool = True) -> Backbone:
    """The backbone that the settings name, to be trained or only sampled. Raises SettingsError."""
    try:
        named = {field.name: getattr(s, field.name) for field in fields(Source) if field.name != "dtypes"}
        return load_backbone(Source(**named, dtypes=load_dtypes(s, train)))
    except ValueError as error:
        raise SettingsError(str(error)) from error


def load_rewards(s: Settings, given: Mapping[str, Reward] | None = None) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """The trained rewards, those given or those that the settings name, and with them all that evaluate. Raises ValueError."""

    def load(name: str) -> Reward:
        return load_reward(
            name, RewardSource(s.reward_models.get(name), s.reward_device, s.reward_pickles, s.judge_template.get(name))
        )

    others = s.eval_rewards if s.eval_rewards is not None else (OF_SHAPES if s.model == "shapes" else ())
    for setting, values in (("reward_models", s.reward_models), ("judge_template", s.judge_template)):
        for name in values:
            if name not in (*s.rewards, *others):
                raise ValueError(f"{setting}: {name} is none of the rewards ({', '.join([*s.rewards, *others])})")
    trained = dict(given) if given is not None else {name: load(name) for name in s.rewards}
    return trained, {**trained, **{name: load(name) for name in others if name not in trained}}


def load_prompts(s: Settings, backbone: Backbone, use: Literal["train", "eval"], given: Sequence[str] | None = None) -> list[str]:
    """The prompts to train on or to evaluate: those given, those of the settings' file, or the model's own.

    Raises SettingsError if there are none, or for one that is blank or that the backbone cannot read.
    """
    setting, path, split = (
        ("prompts", s.prompts, "train") if use == "train" else ("eval_prompts_file", s.eval_prompts_file, s.eval_split)
    )
    source = setting
    if given is not None:
        chosen = list(given)
    elif path is not None:
        chosen, source = read_prompts(setting, path), f"{setting}={path}"
    else:
        chosen = backbone.bundled_prompts(split)
    if not chosen:
        raise SettingsError(f"{source}: there are no prompts; give at least one")
    for number, prompt in enumerate(chosen, 1):
        if not prompt.strip():
            raise SettingsError(f"{source}: prompt {number} is blank; write one there or leave it out")
    try:
        backbone.check(chosen)
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from error
    return chosen

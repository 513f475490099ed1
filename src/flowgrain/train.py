"""A run, and its training step read top to bottom.

Letters: P prompts of a step, N rows of the tree, E trained edges, I images, M rewards, *L latent.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrain import algorithms, checkpoint, credit
from flowgrain.algorithms import Method, plan_tree
from flowgrain.backbones import Backbone, Conditioning, load_backbone, take
from flowgrain.evaluate import Evaluation, decode, evaluate, sample
from flowgrain.objective import EdgeLoss, Edges
from flowgrain.policy import Policy, compute_device
from flowgrain.prompts import latent_noise, noise_of_step, prompts_of_step, read_prompts
from flowgrain.record import Record
from flowgrain.rewards import REWARDS, Reward, Scores, load_reward, score
from flowgrain.rollout import Ints, Rollout, rollout
from flowgrain.sde import Gaussian, Step, sigma_grid
from flowgrain.settings import Settings, SettingsError
from flowgrain.tree import Tree

Metrics = dict[str, Any]


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why and how to resume."""


class Interrupted(RunStopped):
    """SIGINT or SIGTERM: the step was finished and saved."""


@dataclass(frozen=True)
class Sampled:
    """What a step has before its update: the filled tree, its images [I, 3, H, W], the scores of each reward, advantages [E]."""

    prompts: list[str]
    cond: Conditioning
    result: Rollout
    images: Tensor
    scores: dict[str, Scores]
    advantage: Tensor


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
        if s.threads:
            torch.set_num_threads(s.threads)
        self.out = Path(out) if out is not None else Path("runs") / s.name
        self.method = method or algorithms.build(s)
        try:
            self.backbone = backbone or load_backbone(s.model)
            self.rewards = dict(rewards) if rewards is not None else {name: load_reward(name) for name in s.rewards}
            others = s.eval_rewards if s.eval_rewards is not None else (REWARDS if s.model == "shapes" else ())
            self.eval_rewards = {**self.rewards, **{n: load_reward(n) for n in others if n not in self.rewards}}
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.prompts = self._prompts("prompts", prompts, s.prompts, "train")
        self.eval_prompts = self._prompts("eval_prompts_file", eval_prompts, s.eval_prompts_file, s.eval_split)
        self.device = compute_device(s.device)
        self.policy = Policy(self.backbone, s, self.device)
        self.optimizer = torch.optim.AdamW(
            self.policy.trained.values(), lr=s.learning_rate, betas=s.adam_betas, weight_decay=s.weight_decay
        )
        self.sigmas = sigma_grid(s.num_steps, s.shift).to(self.device)
        self.steps_done = 0
        self.skipped_in_a_row = 0
        self.record = Record(self.out, s)
        self._stop_signal: int | None = None

    def _prompts(self, setting: str, given: Sequence[str] | None, path: str | None, split: str) -> list[str]:
        if given is not None:
            chosen, source = list(given), setting
        elif path is not None:
            chosen, source = read_prompts(setting, path), f"{setting}={path}"
        else:
            chosen, source = self.backbone.bundled_prompts(split), setting
        if not chosen:
            raise SettingsError(f"{source}: there are no prompts; give at least one")
        for number, prompt in enumerate(chosen, 1):
            if not prompt.strip():
                raise SettingsError(f"{source}: prompt {number} is blank; write one there or leave it out")
            try:
                self.backbone.check(prompt)
            except ValueError as error:
                raise SettingsError(f"{source}: prompt {number}: {error}") from error
        return chosen

    # ------------------------------------------------------------------ the step

    def step(self, step: int) -> Metrics:
        """One training step: sample, score, give credit, update. Returns the step's metrics. Raises RunStopped."""
        begin = time.perf_counter()
        sampled = self.sample_tree(step)
        after_rollout = time.perf_counter()
        metrics = self.update(sampled)
        now = time.perf_counter()
        tree, result = sampled.result.tree, sampled.result
        for name, scores in sampled.scores.items():
            metrics[f"reward/{name}"] = float(scores.values.nanmean())
            metrics[f"failed/{name}"] = scores.failed
        metrics["advantage/std"] = float(sampled.advantage.std())
        metrics["advantage/zero"] = float((sampled.advantage == 0).float().mean())
        metrics |= {"forward_passes": result.forward_passes, "decodes": len(tree.leaves)}
        metrics |= {"seconds": now - begin, "seconds/sample": after_rollout - begin, "seconds/update": now - after_rollout}
        values = {name: scores.values for name, scores in sampled.scores.items()}
        self.record.keep_tree(step, tree, sampled.prompts[0], sampled.images, values, sampled.advantage)
        self._stop_if_broken(sampled)
        return metrics

    def sample_tree(self, step: int) -> Sampled:
        """Grows the tree of step `step` for its prompts, scores its images and gives every trained edge its advantage."""
        s = self.settings
        prompts = prompts_of_step(self.prompts, step, s.prompts_per_step, s.seed)
        cond = self.policy.encode(prompts)
        tree = plan_tree(self.method, s, step).repeat(len(prompts))

        def velocity(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            return self.policy.sample_velocity(x, sigma, take(cond, prompt), s.guidance_scale)

        noise = noise_of_step(self.backbone.latent_shape, s.seed, step)
        result = rollout(tree, velocity, self.method.kernel, self.sigmas, noise, s.rows_per_pass)
        images = decode(self.policy, result.at(tree.leaves), s.rows_per_pass)
        texts = [prompts[p] for p in tree.prompt[tree.leaves]]
        scores = {name: score(reward, images, texts, s.reward_batch) for name, reward in self.rewards.items()}
        how = credit.Normalisation(s.std_scope, s.std_unbiased, s.std_epsilon)
        values = {name: found.values for name, found in scores.items()}
        advantage = credit.mix(self.method.credit, tree, values, s.rewards, how, s.reward_mix, s.advantage_clip)
        return Sampled(prompts, cond, result, images, scores, advantage)

    def update(self, sampled: Sampled) -> Metrics:
        """The optimizer steps of one rollout: in each one gradient forward per distinct parent, losses summed / global count."""
        s, tree = self.settings, sampled.result.tree
        shares = split_updates(tree, s.updates_per_rollout)
        size = s.train_rows_per_pass or s.rows_per_pass
        passes = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
        old = [None if number == 0 else [self._old_log_prob(sampled, p) for p in share] for number, share in enumerate(passes)]
        losses: list[EdgeLoss] = []
        norms, skipped = [], 0
        for share, old_share in zip(passes, old, strict=True):
            count = int(np.isin(tree.parent[tree.edges], np.concatenate(share)).sum())
            done = []
            for number, parents in enumerate(share):
                # Before the first update the policy is the one that sampled, so its own log-probability is the old one.
                edge_loss = self._edge_loss(sampled, parents, old_share[number] if old_share else None)
                (edge_loss.loss.sum() / count).backward()
                done.append(EdgeLoss(*(value.detach() for value in vars(edge_loss).values())))
            losses += done
            norm = torch.nn.utils.clip_grad_norm_(self.policy.trained.values(), s.max_grad_norm)
            norms.append(norm)
            if torch.isfinite(norm) and all(part.loss.isfinite().all() for part in done):
                self.optimizer.step()
                self.policy.updated()
                self.skipped_in_a_row = 0
            else:
                skipped += 1
                self.skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
        every = {name: torch.cat([getattr(part, name).float() for part in losses]) for name in ("loss", "ratio", "clipped", "kl")}
        metrics: Metrics = {
            "loss": float(every["loss"].mean()),
            "ratio/mean": float(every["ratio"].mean()),
            "ratio/max": float(every["ratio"].max()),
            "clip_fraction": float(every["clipped"].mean()),
            "grad_norm": float(torch.stack(norms).mean()),
            "updates": len(shares),
            "updates/skipped": skipped,
            "train_forward_passes": sum(len(share) for share in shares),
        }
        if s.kl_weight:
            metrics["kl"] = float(every["kl"].mean())
        return metrics

    def _edge_loss(self, sampled: Sampled, parents: Ints, old_log_prob: Tensor | None) -> EdgeLoss:
        """The loss of every trained edge that leaves `parents`, [E]; one gradient forward serves all edges of a parent."""
        law, edges, step = self._law(sampled, parents, self.policy.train_velocity)
        following = sampled.result.at(edges)
        reference = None
        if self.settings.kl_weight:
            reference = self._law(sampled, parents, self.policy.reference_velocity)[0]
        place = np.searchsorted(sampled.result.tree.edges, edges)
        advantage = sampled.advantage[torch.from_numpy(place)].to(self.device)
        old = law.log_prob(following).detach() if old_log_prob is None else old_log_prob
        return self.method.objective(Edges(law, following, old, advantage, step, reference))

    @torch.no_grad()
    def _old_log_prob(self, sampled: Sampled, parents: Ints) -> Tensor:
        """Log-probabilities before the first update, by the very forward whose gradient is taken later: the ratio is exactly 1."""
        law, edges, _ = self._law(sampled, parents, self.policy.train_velocity)
        return law.log_prob(sampled.result.at(edges))

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

    def _stop_if_broken(self, sampled: Sampled) -> None:
        s = self.settings
        for name, scores in sampled.scores.items():
            share = scores.failed / max(len(scores.values), 1)
            if share > s.max_failed_rewards:
                raise RunStopped(
                    f"reward {name!r} failed on {scores.failed} of {len(scores.values)} images ({scores.reason}), more than "
                    f"max_failed_rewards={s.max_failed_rewards:g} allows"
                )
        if self.skipped_in_a_row >= s.max_skipped_updates:
            raise RunStopped(
                f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient and were skipped "
                f"(max_skipped_updates={s.max_skipped_updates}); try a smaller learning_rate than {s.learning_rate:g}"
            )

    # ------------------------------------------------------------------ the loop

    def train(self, progress: Callable[[Metrics], None] | None = None) -> list[Metrics]:
        """Trains to `max_steps`, writing metrics, images, checkpoints, the export and the report. Returns all metrics.

        progress is called with the metrics of every step. A step that cannot go on raises RunStopped, SIGINT and SIGTERM
        raise Interrupted after the step in hand; in both cases a checkpoint is there to resume from.
        """
        s = self.settings
        self.record.start()
        with self._signals():
            if self.steps_done == 0 and s.eval_every:
                self.record.metrics({"step": 0, **self._evaluate_and_keep(0)})
            for step in range(self.steps_done + 1, s.max_steps + 1):
                try:
                    metrics = {"step": step, **self.step(step)}
                except RunStopped as stopped:
                    path = self.save(None)
                    raise RunStopped(f"{stopped}; the run is saved in {path}; resume with {self._resume()}") from stopped
                self.steps_done = step
                last = step == s.max_steps
                if s.eval_every and (step % s.eval_every == 0 or last):
                    metrics |= self._evaluate_and_keep(step)
                self.record.metrics(metrics)
                stopping = self._stop_signal is not None
                if last or stopping or (s.checkpoint_every and step % s.checkpoint_every == 0):
                    self.save(metrics)
                if progress is not None:
                    progress(metrics)
                if stopping and not last:
                    name = signal.Signals(self._stop_signal or 0).name
                    raise Interrupted(f"{name}: step {step} is finished and saved; resume with {self._resume()}")
        self.export()
        self.record.report()
        return self.record.read()

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
        state = {
            "step": self.steps_done,
            "settings": self.settings.model_dump(mode="json"),
            "policy": self.policy.state(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        score = None
        if metrics is not None:
            names = [f"eval/{name}" for name in self.settings.rewards if f"eval/{name}" in metrics]
            score = sum(self.settings.rewards[n.removeprefix("eval/")] * metrics[n] for n in names) if names else None
        return checkpoint.save(self.out / "checkpoints", self.steps_done, state, score, self.settings.keep_checkpoints)

    def restore(self) -> list[str]:
        """Takes the state of the last good checkpoint of this run's folder, if there is one. Returns what was found damaged."""
        path, state, damaged = checkpoint.load_last_good(self.out / "checkpoints", self.device)
        if path is not None:
            self.policy.load_state(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps_done = state["step"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
        return damaged

    def resume(self) -> list[str]:
        """Like `restore`, and makes ready to go on from there: what the folder holds of later steps is dropped."""
        damaged = self.restore()
        self.record.forget_after(self.steps_done)
        return damaged

    def export(self) -> Path:
        """Writes the weights to `export/` in the format of diffusers (full) or of its LoRA loaders. Returns the folder."""
        self.policy.export(self.out / "export")
        return self.out / "export"

    # ------------------------------------------------------------------ looking at it

    def evaluate(self, num_steps: int | None = None, count: int | None = None) -> Evaluation:
        """Scores `count` held-out prompts (default: the settings' `eval_prompts`) at `num_steps` ODE steps, by every reward."""
        s = self.settings
        count = count or s.eval_prompts
        prompts = [self.eval_prompts[i % len(self.eval_prompts)] for i in range(count)]
        return evaluate(
            self.policy,
            prompts,
            self.eval_rewards,
            num_steps=num_steps or s.eval_num_steps,
            shift=s.shift,
            guidance=self.eval_guidance,
            rows_per_pass=s.rows_per_pass,
            reward_batch=s.reward_batch,
        )

    @property
    def eval_guidance(self) -> float:
        """Guidance scale outside training."""
        s = self.settings
        return s.guidance_scale if s.eval_guidance_scale is None else s.eval_guidance_scale

    def sample(self, prompts: Sequence[str], num_steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [I, 3, H, W] in 0..1, one for each of `prompts`, by ODE with the averaged weights."""
        s = self.settings
        for prompt in prompts:
            self.backbone.check(prompt)
        noise = torch.stack([latent_noise(self.backbone.latent_shape, "sample", seed, i) for i in range(len(prompts))])
        with self.policy.averaged():
            return sample(self.policy, prompts, noise, num_steps or s.eval_num_steps, s.shift, self.eval_guidance, s.rows_per_pass)

    def _evaluate_and_keep(self, step: int) -> Metrics:
        evaluation = self.evaluate()
        self.record.keep_evaluation(step, evaluation)
        metrics: Metrics = {f"eval/{name}": value for name, value in evaluation.means().items()}
        return metrics | {f"eval/failures/{kind}": share for kind, share in evaluation.failures.items()}


def split_updates(tree: Tree, updates: int | str) -> list[Ints]:
    """The trained parents of `tree`, dealt to the optimizer steps of a rollout: by grid step, or in equal shares of prompts."""
    parents = tree.trained_parents
    if updates == "per_step":
        levels = tree.level[parents]
        return [parents[levels == level] for level in np.unique(levels)]
    groups = np.array_split(np.unique(tree.prompt[parents]), int(updates))
    if any(len(group) == 0 for group in groups):  # fewer prompts than updates
        return [part for part in np.array_split(parents, int(updates)) if len(part)]
    return [parents[np.isin(tree.prompt[parents], group)] for group in groups]

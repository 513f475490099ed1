"""The watch of a run: measures evaluations, compares them with the base model, raises alarms.

Shapes: I images, P prompts of sampling paths, K states of a path, *L latent, D features.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.data import latent_noise
from flowgrain.models import Conditioning, take
from flowgrain.monitors import MONITORS
from flowgrain.monitors.features import Features, base_distance, distance
from flowgrain.monitors.path import chosen_steps, path_kl
from flowgrain.training.alarms import (
    Difference,
    Finding,
    Measured,
    differences,
    find,
    why_not_comparable,
)
from flowgrain.training.evaluate import (
    Column,
    Evaluation,
    evaluation_noise,
    interleave_rows,
    sample,
)
from flowgrain.training.feature_net import load_net
from flowgrain.training.policy import Policy
from flowgrain.training.signals import check_stop, stop_together
from flowgrain.training.watch_files import (
    Alarm,
    Base,
    append_alarms,
    read_base,
    read_base_evaluation,
    write_base,
)

log = logging.getLogger(__name__)

PAIRS = 16
"""Prompts with a second image, for the diversity."""
PATHS = 8
"""Prompts with a sampling path, for the KL."""
LOWERED = 0.5
"""Factor of the learning rate after an alarm."""


class Watch:
    """The monitors and the alarms of a run.

    Args:
        config: settings of the run.
        policy: the policy that is watched.
        folder: directory of the run. It keeps what the base model measured.

    Attributes:
        alarms: alarms of the last evaluation.
        rate_factor: factor of the learning rate.

    Raises:
        SettingsError: the feature network cannot be loaded.
    """

    def __init__(self, config: Config, policy: Policy, folder: Path) -> None:
        self.config, self.policy, self.world, self.folder = config, policy, policy.world, folder
        self.net = load_net(config.watch, policy.backbone, policy.device)
        self.alarms: list[Alarm] = []
        self._in_a_row: dict[str, int] = {}
        self._lowered = 0
        self._base: Base | None = None

    @property
    def description(self) -> str:
        """What is measured and what an alarm does, in one line."""
        if self.config.watch.action == "off":
            return "nothing (watch.action=off)"
        names = list(MONITORS)
        if self.net is None:
            names = [n for n in names if n not in ("feature_distance", "diversity")]
        features = f"features of {self.net.name}" if self.net else "no feature network"
        return f"{len(names)} monitors, {features}; an alarm: {self.config.watch.action}"

    @property
    def rate_factor(self) -> float:
        lowers = self.config.watch.action == "lower_learning_rate"
        return LOWERED**self._lowered if lowers else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint."""
        return {"in_a_row": dict(self._in_a_row), "lowered": self._lowered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self._in_a_row, self._lowered = dict(state["in_a_row"]), state["lowered"]

    def measure(self, step: int, evaluation: Evaluation) -> Evaluation:
        """Add the monitors that need other images or states than the evaluation has.

        All ranks must call it together. Step 0 records the base model.

        Raises:
            StopRequested: a signal arrived.
        """
        if self.config.watch.action == "off":
            return evaluation
        with self.policy.averaged():
            others = self._other_images(evaluation)
            if step == 0:
                self._record_base(evaluation, others)
            base = self._base = self._base or read_base(self.folder)
            monitors = dict(evaluation.monitors)
            if base is not None:
                monitors |= self._of_features(base, evaluation, others)
                monitors["path_kl"] = self._path_kl(base, evaluation)
        stop_together(self.world)
        return dataclasses.replace(evaluation, monitors=monitors)

    def _of_features(
        self, base: Base, evaluation: Evaluation, others: Features | None
    ) -> dict[str, Column]:
        """feature_distance and diversity, if the base model has features of the same network."""
        net, features, count = self.net, evaluation.features, len(evaluation.prompts)
        if net is None or features is None or others is None or base.net != net.name:
            return {}
        unit = base_distance(base.features[: len(base.others)], base.others)
        pairs = min(count, len(base.features))
        return {
            "feature_distance": _padded(
                distance(features[:pairs], base.features[:pairs]) / unit, count
            ),
            "diversity": _padded(distance(features[: len(others)], others) / unit, count),
        }

    def _other_images(self, evaluation: Evaluation) -> Features | None:
        """Features [n, D] of a second image of the first prompts."""
        if self.net is None:
            return None
        count = min(PAIRS, len(evaluation.prompts))
        places = self.world.assign(count) % count
        shape = self.policy.backbone.latent_shape
        noise = torch.stack([latent_noise(shape, "diversity", 0, int(i)) for i in places])
        texts = [evaluation.prompts[i].text for i in places]
        config, sigmas = self.config, self.config.sigmas(evaluation.num_steps)
        size, guidance = config.sampling.batch_size, config.eval_guidance
        images = sample(self.policy, texts, noise, sigmas, guidance, size).images
        return interleave_rows(self.world.gather(self.net.net(images)), count)

    def _record_base(self, evaluation: Evaluation, others: Features | None) -> None:
        """Write the features and the sampling paths of the base model."""
        sigmas = self.config.sigmas(evaluation.num_steps).to(self.policy.device)
        count = min(PATHS, len(evaluation.prompts))
        places = self.world.assign(count) % count
        x = evaluation_noise(self.policy.backbone.latent_shape, 0, places.tolist())
        x = x.to(self.policy.device)
        states, chosen = [], chosen_steps(evaluation.num_steps)
        cond = self.policy.encode([evaluation.prompts[i].text for i in places])
        for index in range(chosen[-1] + 1):
            if index in chosen:
                states.append(x.cpu())
            x = x + (sigmas[index + 1] - sigmas[index]) * self._velocity(x, sigmas[index], cond)
        of_rank = torch.stack(states, 1)
        everything = interleave_rows(self.world.gather(of_rank.numpy()), count)
        v_base = self._velocities(everything, evaluation)
        none = np.zeros((0, 0), dtype=np.float32)
        base = Base(
            net=self.net.name if self.net else "",
            features=none if evaluation.features is None else evaluation.features,
            others=none if others is None else others,
            x=everything,
            v=v_base,
        )
        self.world.on_main(lambda: write_base(self.folder, base))

    def _velocities(self, x: Features, evaluation: Evaluation) -> Features:
        """Velocities [P, K, *L] of the policy at the states `x` of all ranks' prompts."""
        count = len(x)
        places = self.world.assign(count) % count
        sigmas = self.config.sigmas(evaluation.num_steps).to(self.policy.device)
        cond = self.policy.encode([evaluation.prompts[i].text for i in places])
        found = []
        for number, index in enumerate(chosen_steps(evaluation.num_steps)):
            states = torch.from_numpy(x[places, number]).to(self.policy.device)
            found.append(self._velocity(states, sigmas[index], cond).cpu())
        of_rank = torch.stack(found, 1).numpy()
        return interleave_rows(self.world.gather(of_rank), count)

    def _velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v [B, *L] at noise level `sigma`, in float32."""
        found = []
        for rows in torch.split(torch.arange(len(x)), self.config.sampling.batch_size):
            check_stop(self.world)
            part, of_rows = take(cond, rows.to(x.device)), x[rows]
            guidance, sigmas = self.config.eval_guidance, sigma.repeat(len(rows))
            found.append(self.policy.sample_velocity(of_rows, sigmas, part, guidance).float())
        return torch.cat(found)

    def _path_kl(self, base: Base, evaluation: Evaluation) -> Column:
        """KL [I] to the base model. NaN for images without a path."""
        count, states = len(evaluation.prompts), len(chosen_steps(evaluation.num_steps))
        if base.x.shape[1] != states or len(base.x) > count:
            return np.full(count, np.nan, dtype=np.float32)
        v = self._velocities(base.x, evaluation)
        x, v_now, v_base = (torch.from_numpy(a) for a in (base.x, v, base.v))
        return _padded(path_kl(x, v_now, v_base, self.config.sigmas(evaluation.num_steps)), count)

    def judge(self, step: int, evaluation: Evaluation) -> dict[str, Difference]:
        """Compare a measured evaluation with the base model, and raise the alarms of the rule.

        All ranks must call it together.

        Returns:
            The paired difference of every reward and monitor. Empty at step 0, or if there is no
            comparable evaluation of the base model.
        """
        found, self.alarms, self._in_a_row = self.world.on_main(
            lambda: self._judge(step, evaluation)
        )
        if self.alarms and self.config.watch.action == "lower_learning_rate":
            self._lowered += 1
        return found

    def _judge(
        self, step: int, evaluation: Evaluation
    ) -> tuple[dict[str, Difference], list[Alarm], dict[str, int]]:
        rule, guidance = self.config.watch, self.config.eval_guidance
        if step == 0 or rule.action == "off":
            return {}, [], {}
        base = read_base_evaluation(self.folder, guidance)
        if base is None:
            log.warning(
                "step %d: there is no evaluation of the base model to compare with, so there are "
                "no alarms. Set evaluation.every in a new run.",
                step,
            )
            return {}, [], {}
        now = Measured(
            [prompt.text for prompt in evaluation.prompts],
            evaluation.num_steps,
            guidance,
            evaluation.scores,
            evaluation.monitors,
        )
        reason = why_not_comparable(base, now)
        if reason is not None:
            log.warning("step %d: no comparison with the base model, because %s.", step, reason)
            return {}, [], {}
        findings = find(base, now, self.config.reward_weights, rule)
        in_a_row = {f.monitor: self._in_a_row.get(f.monitor, 0) + 1 for f in findings}
        alarms = [
            Alarm(step, f, in_a_row[f.monitor], rule.action, _message(step, f, rule.threshold))
            for f in findings
            if in_a_row[f.monitor] >= rule.patience
        ]
        if alarms:
            append_alarms(self.folder, alarms)
            others = ", ".join(alarm.finding.monitor for alarm in alarms[1:])
            log.warning("%s%s", alarms[0].message, f" Also: {others}." if others else "")
        return differences(base, now), alarms, in_a_row


def _message(step: int, finding: Finding, threshold: float) -> str:
    """The message of an alarm."""
    monitor = MONITORS.get(finding.monitor)
    unit = "standard deviations of the base model" if monitor is None or monitor.spread else ""
    allowed = f"{finding.threshold:.3g}{f' ({threshold:g} {unit})' if unit else ''}"
    return (
        f"step {step}: alarm: the trained reward is above the base model, but {finding.monitor} "
        f"changed by {finding.difference:+.3g} [{finding.low:+.3g}, {finding.high:+.3g}], more "
        f"than {allowed}."
    )


def _padded(values: Tensor | NDArray[np.floating], count: int) -> Column:
    """`values` of the first images as a column [count]. NaN for the other images."""
    column = np.full(count, np.nan, dtype=np.float32)
    column[: len(values)] = np.asarray(values)
    return column

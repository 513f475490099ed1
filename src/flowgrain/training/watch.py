"""The watch of a run: measures evaluations, compares them with the base model, raises alarms.

Shapes: I images, D features.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowgrain.config.schema import Config
from flowgrain.config.watch import WatchConfig
from flowgrain.monitors import MONITORS
from flowgrain.monitors.features import Features, base_distance, distance
from flowgrain.training.alarms import (
    Difference,
    Finding,
    Measured,
    differences,
    find,
    why_not_comparable,
)
from flowgrain.training.evaluate import Column, Evaluation
from flowgrain.training.feature_net import load_net
from flowgrain.training.policy import Policy
from flowgrain.training.probe import Probe, padded
from flowgrain.training.signals import stop_together
from flowgrain.training.watch_files import (
    Alarm,
    Base,
    read_base,
    read_measured,
    write_base,
)

log = logging.getLogger(__name__)

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
        loaded = load_net(config.watch, policy.backbone, policy.device)
        self.net_name, self.net = loaded.name, loaded.net
        self.alarms: list[Alarm] = []
        self._in_a_row: dict[str, int] = {}
        self._lowered = 0
        self._base: Base | None = None

    @property
    def description(self) -> str:
        """What is measured and what an alarm does, in one line."""
        if self.config.watch.action == "off":
            return "nothing (watch.action=off)"
        features = self.net_name or "none, so without feature_distance and diversity"
        return f"feature network {features}; action at an alarm {self.config.watch.action}"

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
            probe = Probe(self.config, self.policy, evaluation)
            others = None if self.net is None else probe.features_of_others(self.net)
            if step == 0:
                self._record_base(probe, others)
            # The other ranks may not see the file. All ranks must measure the same.
            base = self._base = self._base or self.world.on_main(lambda: read_base(self.folder))
            monitors = dict(evaluation.monitors)
            if base is not None:
                monitors |= self._of_features(base, evaluation, others)
                monitors |= probe.path_kl(base.x, base.v)
        stop_together(self.world)
        return dataclasses.replace(evaluation, monitors=monitors)

    def _record_base(self, probe: Probe, others: Features | None) -> None:
        """Write the features and the sampling paths of the base model."""
        x = probe.states()
        v, features = probe.velocities(x), probe.evaluation.features
        none = np.zeros((0, 0), dtype=np.float32)
        base = Base(
            net=self.net_name,
            features=none if features is None else features,
            others=none if others is None else others,
            x=x,
            v=v,
        )
        self.world.on_main(lambda: write_base(self.folder, base))

    def _of_features(
        self, base: Base, evaluation: Evaluation, others: Features | None
    ) -> dict[str, Column]:
        """feature_distance and diversity, if the base model has features of the same network."""
        features, count = evaluation.features, len(evaluation.prompts)
        if features is None or others is None or base.net != self.net_name:
            return {}
        unit = base_distance(base.features[: len(base.others)], base.others)
        pairs = min(count, len(base.features))
        return {
            "feature_distance": padded(
                distance(features[:pairs], base.features[:pairs]) / unit, count
            ),
            "diversity": padded(distance(features[: len(others)], others) / unit, count),
        }

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
        base = read_measured(self.folder, 0, guidance)
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
            Alarm(step, f, in_a_row[f.monitor], rule.action, _message(step, f, rule))
            for f in findings
            if in_a_row[f.monitor] >= rule.patience
        ]
        if alarms:
            others = ", ".join(alarm.finding.monitor for alarm in alarms[1:])
            log.warning("%s%s", alarms[0].message, f" Also: {others}." if others else "")
        return differences(base, now), alarms, in_a_row


def _message(step: int, finding: Finding, rule: WatchConfig) -> str:
    """The message of an alarm."""
    monitor = MONITORS.get(finding.monitor)
    threshold = rule.reward_threshold if monitor is None else rule.threshold
    unit = "standard deviations of the base model" if monitor is None or monitor.spread else ""
    allowed = f"{finding.threshold:.3g}{f' ({threshold:g} {unit})' if unit else ''}"
    return (
        f"step {step}: alarm: the trained reward is above the base model, but {finding.monitor} "
        f"changed by {finding.difference:+.3g} [{finding.low:+.3g}, {finding.high:+.3g}], more "
        f"than {allowed}."
    )

"""The curves of a run."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flowgrain.report.run_data import RunData
from flowgrain.report.run_watch import distance_from_base, monitor_changes
from flowgrain.report.svg import PALETTE, Curve, Figure, draw_figure
from flowgrain.statistics import confidence_interval

SMOOTHING_WINDOW = 9
"""Training steps of the moving average."""


def run_figures(run: RunData) -> list[Figure]:
    """The figures of a run. Figures without data are left out."""
    figures: Sequence[Callable[[RunData], Figure | None]] = (
        training_rewards,
        evaluation_scores,
        other_scores,
        monitor_changes,
        distance_from_base,
        gradient_norms,
        clip_fractions,
        kl_divergence,
        calibrated_noise,
        calibration_balance,
    )
    return [figure for draw in figures if (figure := draw(run)) is not None]


def training_rewards(run: RunData) -> Figure | None:
    """Mean reward of every step's images, with its moving average."""
    curves = []
    for name in run.trained_rewards:
        steps, values = _series(run, f"reward/{name}")
        if steps:
            curves.append(Curve(steps, moving_average(np.array(values)).tolist(), name, raw=values))
    if not curves:
        return None
    ylabel = "mean reward of a step's images"
    return draw_figure("Training reward", curves, "training step", ylabel)


def evaluation_scores(run: RunData) -> Figure | None:
    """Scores of held-out prompts by the trained rewards, with confidence intervals."""
    curves = [
        _evaluation_curve(run, name)
        for name in run.trained_rewards
        if name in run.evaluated_rewards
    ]
    if not curves:
        return None
    title = "Held-out prompts, with 95% confidence interval"
    return draw_figure(title, curves, "training step", "mean score")


def other_scores(run: RunData) -> Figure | None:
    """Change of the held-out scores by other rewards, in initial standard deviations."""
    names = [name for name in run.evaluated_rewards if name not in run.trained_rewards]
    if not names or len(run.evaluations) < 2:
        return None
    steps = [evaluation.step for evaluation in run.evaluations]
    curves = []
    for name in names:
        scores = [_scores(evaluation.scores[name]) for evaluation in run.evaluations]
        spread = np.nanstd(scores[0]) or 1
        means = np.array([confidence_interval(values).mean for values in scores])
        change = (means - means[0]) / spread
        curves.append(Curve(steps, change.tolist(), name, markers=True))
    ylabel = "change in standard deviations"
    return draw_figure("Rewards that are not trained", curves, "training step", ylabel)


def gradient_norms(run: RunData) -> Figure | None:
    """Gradient norm of every step."""
    steps, norms = _series(run, "grad_norm")
    if not any(norm > 0 for norm in norms):
        return None
    title, ylabel = "Gradient norm", "gradient norm before clipping"
    return draw_figure(title, [Curve(steps, norms)], "training step", ylabel, yscale="log")


def clip_fractions(run: RunData) -> Figure | None:
    """Share of edges whose ratio was clipped. It is always 0 in the first update of a rollout."""
    curves = []
    for key, label in (
        ("clip_fraction", "all updates"),
        ("clip_fraction/later_updates", "after the first update"),
    ):
        steps, values = _series(run, key)
        if steps:
            curves.append(Curve(steps, values, label))
    if not any(value > 0 for curve in curves for value in curve.y):
        return None
    ylabel = "share of clipped edges"
    return draw_figure("Clip fraction", curves, "training step", ylabel, ylim=(0, 1))


def kl_divergence(run: RunData) -> Figure | None:
    """KL to the reference model."""
    steps, values = _series(run, "kl")
    if not steps:
        return None
    ylabel = "KL per latent dimension"
    return draw_figure("KL to the reference", [Curve(steps, values)], "training step", ylabel)


def calibrated_noise(run: RunData) -> Figure | None:
    """The noise strengths psi before and after calibration."""
    if run.calibration is None:
        return None
    rounds = run.calibration.rounds
    before, after = rounds[0].psi, run.calibration.psi
    grid = list(range(len(after)))
    curves = [
        Curve(grid, before, "before calibration", markers=True, dashed=True),
        Curve(grid, after, "calibrated", markers=True),
    ]
    title = f"Calibrated noise, {len(rounds)} rounds"
    return draw_figure(title, curves, "grid step", "noise strength psi", yscale="log")


def calibration_balance(run: RunData) -> Figure | None:
    """Shares of trajectories that gained and lost reward, in the first and the last round."""
    if run.calibration is None:
        return None
    first, last = run.calibration.rounds[0], run.calibration.rounds[-1]
    curves = []
    for values, name, dashed in ((first, "first round", True), (last, "last round", False)):
        for key, shares, color in (
            ("gained", values.gained, PALETTE[2]),
            ("lost", values.lost, PALETTE[4]),
        ):
            grid = list(range(len(shares)))
            curves.append(Curve(grid, shares, f"{key}, {name}", dashed=dashed, color=color))
    title, ylabel = "Reward gained or lost at a step", "share of trajectories"
    return draw_figure(title, curves, "grid step", ylabel, ylim=(0, 1))


def moving_average(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Centered mean of up to `SMOOTHING_WINDOW` values [S]. It is shorter at the ends."""
    half = min(SMOOTHING_WINDOW, len(values)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _series(run: RunData, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metric `key`, for the steps that have it."""
    lines = [line for line in run.steps if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _evaluation_curve(run: RunData, name: str) -> Curve:
    intervals = [confidence_interval(_scores(e.scores[name])) for e in run.evaluations]
    return Curve(
        x=[evaluation.step for evaluation in run.evaluations],
        y=[interval.mean for interval in intervals],
        label=name,
        low=[interval.low for interval in intervals],
        high=[interval.high for interval in intervals],
        markers=True,
    )


def _scores(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)

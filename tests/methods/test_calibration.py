"""Calibration of the noise: the rule by hand, its cost, and restored after a resume."""

import json

import numpy as np
import pytest
from toy_trainer import toy_config, toy_trainer

from flowgrain.methods.calibration import calibration_cost, calibration_tree

ROUNDS, SAMPLES = 3, 8


def calibrated(method: str = "densegrpo", max_steps: int = 1, **options):
    """A configuration whose noise is calibrated before the first step."""
    changes = {
        "method.sde_type": "calibrated_sde",
        "method.calibration.rounds": ROUNDS,
        "method.calibration.samples": SAMPLES,
        "training.max_steps": max_steps,
        "evaluation.every": 0,
        **{f"method.{name}": value for name, value in options.items()},
    }
    return toy_config(method, changes)


def psi_by_hand(saved, psi) -> np.ndarray:
    """The psi that the rounds in `saved` lead to from `psi`."""
    for entry in saved["rounds"]:
        np.testing.assert_allclose(entry["psi"], psi)
        balanced = np.abs(np.array(entry["gained"]) - np.array(entry["lost"])) < 0.25
        psi = np.maximum(psi + np.where(balanced, 0.01, -0.01), 0.01)
    return psi


def test_calibration_follows_the_balance_and_is_restored(tmp_path, monkeypatch):
    trainer = toy_trainer(calibrated(), tmp_path)
    start = trainer.method.initial_psi(trainer.sigmas)
    assert trainer.method.needs_calibration
    trainer.train()
    assert not trainer.method.needs_calibration
    saved = json.loads((tmp_path / "calibration.json").read_text())
    np.testing.assert_allclose(saved["psi"], psi_by_hand(saved, np.array(start)))
    psi = trainer.method.kernel(trainer.sigmas).psi
    assert psi == tuple(saved["psi"])
    assert psi != start

    resumed = toy_trainer(calibrated(max_steps=2), tmp_path)
    monkeypatch.setattr(resumed, "calibrate", lambda: pytest.fail("psi is already known"))
    resumed.resume()
    assert resumed.method.kernel(resumed.sigmas).psi == psi
    resumed.train()
    assert resumed.collector.kernel().psi == psi


def test_the_cost_of_calibration_is_what_runs(tmp_path, monkeypatch):
    config = calibrated()
    trainer = toy_trainer(config, tmp_path)
    score_tree, rollouts = trainer.collector.score_tree, []

    def counted(*args):
        scored = score_tree(*args)
        rollouts.append(scored)
        return scored

    monkeypatch.setattr(trainer.collector, "score_tree", counted)
    expected = calibration_cost(trainer.method, 5, num_rewards=2)
    result = trainer.calibrate()
    assert len(rollouts) == ROUNDS
    passes = sum(scored.rollout.forward_passes for scored in rollouts)
    assert result.forward_passes == expected.forward_passes == passes
    images = sum(len(scored.images) for scored in rollouts)
    assert result.decodes == expected.decodes == images
    assert expected.reward_calls == 2 * images
    # Nothing is left to calibrate.
    assert calibration_cost(trainer.method, 5).forward_passes == 0


@pytest.mark.parametrize("method", ["g2rpo", "flow_grpo", "mixgrpo"])
def test_every_policy_gradient_method_can_be_calibrated(method, tmp_path):
    """The calibrated steps are all steps that the method may make stochastic."""
    own = {"window_size": 2} if method == "mixgrpo" else {}
    trainer = toy_trainer(calibrated(method, **own), tmp_path)
    trainer.step(1)
    saved = json.loads((tmp_path / "calibration.json").read_text())
    start = np.array(trainer.method.initial_psi(trainer.sigmas))
    np.testing.assert_allclose(saved["psi"], psi_by_hand(saved, start))


def test_only_chosen_steps_are_calibrated(tmp_path):
    trainer = toy_trainer(calibrated(sde_steps=[1, 3]), tmp_path)
    tree = calibration_tree(trainer.method, 5)
    assert tree.grid_index[tree.parent[tree.edges]].tolist() == [1, 3]
    trainer.calibrate()
    start = trainer.method.initial_psi(trainer.sigmas)
    psi = trainer.method.kernel(trainer.sigmas).psi
    assert [k for k in range(5) if psi[k] != start[k]] == [1, 3]

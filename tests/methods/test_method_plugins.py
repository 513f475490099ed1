"""Methods from outside the package, which keep state: a plugin file, a class, an instance."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import PrivateAttr
from toy_trainer import toy_config, toy_trainer

from flowgrain.config import load_config
from flowgrain.core.credit import row_values
from flowgrain.methods import METHODS, PolicyGradient
from flowgrain.settings import SettingsError
from flowgrain.training import checkpoint

PLUGIN = '''
"""A method whose baseline is the mean reward of all steps so far."""

from pydantic import PrivateAttr

from flowgrain import PolicyGradient, register
from flowgrain.core.credit import row_values
from flowgrain.settings import Setting


@register
class RunningBaseline(PolicyGradient):
    """Trajectories with noise at every step, compared with all earlier rewards."""

    name = "running_baseline"
    title = "Running baseline"

    scale: float = Setting(2.0, "Scale of the advantage.", gt=0)
    _rewards: list[float] = PrivateAttr(default_factory=list)

    def plan(self, tree, step, seed):
        for _ in range(self.group_size):
            node = tree.root()
            for _ in range(tree.num_steps - 1):
                node = tree.sde(node)[0]
            tree.image(tree.ode(node))

    def credit(self, tree, rewards, how):
        self._rewards.append(float(rewards.mean()))
        baseline = sum(self._rewards) / len(self._rewards)
        return self.scale * (row_values(tree, rewards)[tree.edges, 0] - baseline).float()

    def state_dict(self):
        return {**super().state_dict(), "rewards": self._rewards}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._rewards = list(state["rewards"])
'''

CHANGES = {"training.max_steps": 2, "training.checkpoint_every": 1, "evaluation.every": 0}
CALIBRATED = {
    "method.sde_type": "calibrated_sde",
    "method.calibration.rounds": 2,
    "method.calibration.samples": 4,
}


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """The plugin file. After the test the method is not registered."""
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))
    path = tmp_path / "my_method.py"
    path.write_text(PLUGIN)
    yield path
    forget(path)


def forget(path: Path) -> None:
    """Unload the plugin, as in a new process."""
    for name in [name for name in sys.modules if name.endswith(f"_{path.stem}")]:
        del sys.modules[name]
    METHODS._objects.pop("running_baseline", None)


def plugin_config(path: Path, changes):
    return toy_config("running_baseline", {"runtime.plugins": [str(path)], **changes})


def parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters.values()])


@pytest.mark.parametrize("noise", [{}, CALIBRATED], ids=["flow_sde", "calibrated_sde"])
def test_a_resumed_plugin_method_keeps_its_state(plugin, noise, tmp_path, monkeypatch):
    """Four steps, and two steps that another process resumes, are equal to the bit."""
    changes = {**CHANGES, **noise}
    whole = toy_trainer(
        plugin_config(plugin, {**changes, "training.max_steps": 4}), tmp_path / "whole"
    )
    whole.train()
    first = toy_trainer(plugin_config(plugin, changes), tmp_path / "run")
    first.train()
    forget(plugin)
    config = load_config(tmp_path / "run", {"training.max_steps": 4})  # loads the plugin
    assert config.runtime.plugins == (str(plugin),)
    resumed = toy_trainer(config, tmp_path / "run")
    assert type(resumed.method) is not type(first.method)
    monkeypatch.setattr(resumed, "calibrate", lambda: pytest.fail("psi is already known"))
    resumed.resume()
    assert resumed.steps_done == 2
    assert resumed.method.state_dict() == first.method.state_dict()
    assert len(resumed.method._rewards) == 2 * 2  # steps x rewards
    kernels = [trainer.method.kernel(trainer.sigmas) for trainer in (first, resumed)]
    assert kernels[0] == kernels[1]
    resumed.train()
    assert resumed.method.state_dict() == whole.method.state_dict()
    assert torch.equal(parameters(resumed), parameters(whole))


def test_restore_reads_the_state_without_training(plugin, tmp_path):
    trainer = toy_trainer(plugin_config(plugin, CHANGES), tmp_path / "run")
    trainer.train()
    again = toy_trainer(plugin_config(plugin, CHANGES), tmp_path / "run")
    assert again.method.state_dict() != trainer.method.state_dict()
    again.restore()
    assert again.method.state_dict() == trainer.method.state_dict()
    newest = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert checkpoint.load(newest)["method"] == trainer.method.state_dict()


def test_trainers_of_the_same_configuration_do_not_share_state(plugin, tmp_path):
    config = plugin_config(plugin, CHANGES)
    toy_trainer(config, tmp_path / "a").train()
    assert toy_trainer(config, tmp_path / "b").method._rewards == []
    assert config.method._rewards == []


def test_options_of_a_plugin_are_checked(plugin):
    assert plugin_config(plugin, {"method.scale": 3.0}).method.scale == 3.0
    with pytest.raises(SettingsError, match=r"method.scale=-1.0: .*Scale of the advantage"):
        plugin_config(plugin, {"method.scale": -1.0})
    expected = r"Method 'running_baseline' has no option 'window_size'. Remove it, or use method"
    with pytest.raises(SettingsError, match=expected):
        plugin_config(plugin, {"method.window_size": 2})
    expected = r"Method 'running_baseline' has no option 'scales'. Did you mean 'method.scale'"
    with pytest.raises(SettingsError, match=expected):
        plugin_config(plugin, {"method.scales": 2})


def test_a_plugin_can_be_given_beside_the_configuration(plugin):
    config = load_config("running_baseline", plugins=[plugin])
    assert config.method.title == "Running baseline"
    assert config.runtime.plugins == (str(plugin),)


class CountsImages(PolicyGradient):
    """A method that is not registered: it counts the images that it has seen."""

    name = "counts_images"
    _images: int = PrivateAttr(0)

    def plan(self, tree, step, seed):
        root = tree.root()
        for branch in tree.sde(root, self.group_size):
            tree.image(tree.ode(branch))

    def credit(self, tree, rewards, how):
        self._images += len(rewards)
        value = row_values(tree, rewards)[tree.edges, 0]
        return (value - value.mean()).float()

    def state_dict(self):
        return {**super().state_dict(), "images": self._images}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._images = state["images"]


def test_a_class_that_is_not_registered(tmp_path):
    config = toy_config("g2rpo", CHANGES)
    trainer = toy_trainer(config, tmp_path, method=CountsImages)
    trainer.train()
    assert trainer.method._images > 0
    resumed = toy_trainer(
        config.with_changes({"training.max_steps": 3}), tmp_path, method=CountsImages
    )
    resumed.resume()
    assert resumed.steps_done == 2
    assert resumed.method._images == trainer.method._images
    resumed.train()
    assert resumed.method._images * 2 == trainer.method._images * 3


def test_an_instance_with_calibrated_noise(tmp_path, monkeypatch):
    """The calibrated noise belongs to the run. The given instance does not change."""
    calibration = {"rounds": 2, "samples": 4}
    method = CountsImages.model_validate(
        {"sde_type": "calibrated_sde", "calibration": calibration, "group_size": 4}
    )
    config = toy_config("g2rpo", CHANGES)
    trainer = toy_trainer(config, tmp_path, method=method)
    trainer.train()
    psi = trainer.method.kernel(trainer.sigmas).psi
    assert psi != trainer.method.initial_psi(trainer.sigmas)
    assert method.needs_calibration
    assert method._images == 0
    resumed = toy_trainer(config, tmp_path, method=method)
    monkeypatch.setattr(resumed, "calibrate", lambda: pytest.fail("psi is already known"))
    resumed.resume()
    assert type(resumed.method) is CountsImages
    assert resumed.collector.kernel().psi == psi


def test_state_of_another_method_is_an_error(tmp_path):
    trainer = toy_trainer(toy_config("diffusionnft", {"method.kl_weight": 0.0}), tmp_path)
    with pytest.raises(ValueError, match="method 'diffusionnft' has no state images"):
        trainer.method.load_state_dict({"images": 3})

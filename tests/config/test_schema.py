"""The settings document themselves, every setting is used, and every setting is tested."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml

import flowgrain
from flowgrain import METHODS, SettingsError, load_config
from flowgrain.config.explain import setting_paths
from flowgrain.config.schema import Config
from flowgrain.core.sde import Shift, sigma_grid
from flowgrain.methods import Method
from flowgrain.rewards import RewardConfig
from flowgrain.settings import Section

SOURCES = Path(flowgrain.__file__).parent
TESTS = Path(__file__).parent.parent


def walk(section, prefix=""):
    """All fields below a section by full path, without those of sections in lists."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Method:
            yield from walk(kind, f"{prefix}{name}.")


def all_fields():
    """Every field of every section, of every built-in method and of a reward, by full path."""
    fields = dict(walk(Config))
    fields |= dict(walk(RewardConfig, "rewards."))
    for name in METHODS:
        fields |= dict(walk(METHODS.get(name), "method."))
    return fields


FIELDS = all_fields()
LEAVES = {
    path: field
    for path, field in FIELDS.items()
    if path != "rewards" and not any(other.startswith(f"{path}.") for other in FIELDS)
}


def contains_int(annotation):
    if get_origin(annotation) is Literal:
        return False
    return annotation is int or any(contains_int(part) for part in get_args(annotation))


def test_all_sections_are_walked():
    assert len(FIELDS) > 100
    assert {"name", "method.psi", "method.calibration.step", "rewards.weight"} <= set(LEAVES)
    own = METHODS.get("mixgrpo")
    assert set(setting_paths(own)) - {"method.name"} <= {*FIELDS, "rewards"}


@pytest.mark.parametrize("path", FIELDS)
def test_every_setting_has_a_description(path):
    description = FIELDS[path].description
    assert description, path
    assert description[0].isupper(), description
    assert description.endswith("."), description


NOT_COUNTS = ("runtime.seed", "lora.rank")


@pytest.mark.parametrize("path", FIELDS)
def test_every_count_has_a_unit(path):
    """An integer counts something, except for a seed and the rank of a matrix."""
    extra = FIELDS[path].json_schema_extra
    assert set(extra) == {"unit", "keep"}
    if contains_int(FIELDS[path].annotation) and path not in NOT_COUNTS:
        assert extra["unit"], path
    if path.endswith("_seconds"):
        assert extra["unit"] == "seconds"


def test_a_method_that_changes_a_default_keeps_description_and_limits():
    base, own = (
        Method.model_fields["group_size"],
        METHODS.get("flow_grpo").model_fields["group_size"],
    )
    assert own.description == base.description
    assert own.metadata == base.metadata
    assert (base.default, own.default) == (12, 24)


class Uses(ast.NodeVisitor):
    """What files of Python code name.

    Attributes:
        attributes: names of the attributes that are read. A declaration of a field does not count.
        strings: all strings.
        keys: string keys of mappings, and names of keyword arguments.
    """

    def __init__(self, files):
        self.attributes, self.strings, self.keys = set(), [], set()
        for file in files:
            self.visit(ast.parse(file.read_text(encoding="utf-8")))
        self.text = "\n".join(self.strings)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.attributes.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.strings.append(node.value)

    def visit_Dict(self, node):
        self.keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        self.generic_visit(node)

    def visit_keyword(self, node):
        self.keys.add(node.arg)
        self.generic_visit(node)


@pytest.fixture(scope="module")
def source():
    return Uses(SOURCES.rglob("*.py"))


@pytest.fixture(scope="module")
def tested():
    return Uses(file for file in TESTS.rglob("*.py") if file != Path(__file__))


def is_set(path, tested):
    """Whether a test sets the setting at `path`.

    Tests set settings by full path, as users do: as key of a mapping, or in a word
    "section.key=VALUE". Methods and rewards can also be built without a configuration. Their
    options may therefore be a key of a mapping, a keyword argument, or a word "option=VALUE".
    """
    if re.search(rf"(?<![\w.]){re.escape(path)}(?![\w.])", tested.text):
        return True
    section, _, option = path.partition(".")
    if section not in ("method", "rewards"):
        return False
    return option in tested.keys or any(text.startswith(f"{option}=") for text in tested.strings)


@pytest.mark.parametrize("path", LEAVES)
def test_every_setting_is_read_by_the_package(source, path):
    """An attribute with the name of the setting is read somewhere, or its full path is a string."""
    key = path.split(".")[-1]
    assert key in source.attributes or key in source.strings


@pytest.mark.parametrize("path", LEAVES)
def test_every_setting_is_set_by_a_test(tested, path):
    assert is_set(path, tested)


def test_a_setting_that_nothing_uses_is_found(source, tested):
    for path in ("sampling.num_stepz", "method.unused", "rewards.unused", "training.num_steps"):
        assert not is_set(path, tested)
    assert "num_stepz" not in source.attributes


# ---------------------------------------------------------------------- derived values


def test_the_grid():
    config = load_config("g2rpo", {"sampling.num_steps": 5, "sampling.shift": 2.0})
    assert torch.equal(config.sigmas(), sigma_grid(5, 2.0, None))
    assert torch.equal(config.sigmas(7), sigma_grid(7, 2.0, None))
    stretched = config.with_changes({"sampling.shift_terminal": 0.05})
    assert float(stretched.sigmas()[-2]) == pytest.approx(0.05)
    automatic = config.with_changes({"sampling.shift": "auto"})
    assert torch.equal(automatic.sigmas(), sigma_grid(5, 3.0, None))
    backbone = SimpleNamespace(natural_shift=lambda num_steps: Shift(2.0, 0.05, 0.01))
    assert torch.equal(automatic.with_grid_of(backbone).sigmas(), stretched.sigmas())
    own = automatic.with_changes({"sampling.shift_terminal": 0.1}).with_grid_of(backbone)
    assert own.sampling.shift_terminal == 0.1  # it was set
    assert config.with_grid_of(backbone) is config
    lowest = config.with_changes({"sampling.sigma_min": 0.01})
    assert torch.equal(lowest.sigmas(), sigma_grid(5, 2.0, None, 0.01))


def test_the_grid_of_the_model():
    backbone = SimpleNamespace(natural_shift=lambda num_steps: (2.0, None, 0.01))
    config = load_config("g2rpo", {"sampling.grid": "model", "sampling.num_steps": 5})
    assert not config.grid_is_known
    resolved = config.with_grid_of(backbone)
    assert resolved.grid_is_known
    assert torch.equal(resolved.sigmas(), sigma_grid(5, 2.0, None, 0.01))
    for name, value in (("shift", 3.0), ("sigma_min", 0.1), ("shift_terminal", 0.1)):
        with pytest.raises(SettingsError, match=rf"sampling\.{name}={value}: has no effect"):
            config.with_changes({f"sampling.{name}": value})
    with pytest.raises(SettingsError, match=r"leave out sampling\.grid=model to resume it"):
        resolved.with_changes({"sampling.grid": "model"})
    assert not load_config("g2rpo", {"sampling.shift": "auto"}).grid_is_known


def test_settings_of_adapters_need_adapters():
    for name, value in (("alpha", 8.0), ("target_modules", ["attn.to_q"])):
        with pytest.raises(
            SettingsError, match=rf"lora\.{name}=.*: has no effect without adapters"
        ):
            load_config("g2rpo", {f"lora.{name}": value})


def test_the_learning_rate_is_the_published_one():
    def rate(method, **changes):
        return load_config(method, {"model.name": "flux", **changes}).learning_rate

    assert (rate("dancegrpo"), rate("dancegrpo", **{"lora.rank": 8})) == (1e-5, 3e-4)
    assert (rate("g2rpo"), rate("flow_grpo"), rate("grpo_guard")) == (2e-6, 3e-4, 1e-4)
    assert rate("g2rpo", **{"optimizer.learning_rate": 1e-3}) == 1e-3
    with pytest.raises(SettingsError) as error:
        rate("flow_grpo", **{"lora.rank": 0})
    assert str(error.value) == (
        "optimizer.learning_rate: no learning rate of a full fine-tune was published for method "
        "'flow_grpo'. The rate of a LoRA is 0.0003. Set optimizer.learning_rate."
    )
    assert load_config("flow_grpo").learning_rate == 3e-4  # of the bundled model


def test_the_order_of_the_tail_depends_on_its_approximation():
    def schedule(changes):
        return load_config("g2rpo", {"method.sde_steps": [0], **changes}).tail_schedule

    assert schedule({}) == "interleaved"
    assert schedule({"sampling.tail_weights": "int8"}) == "last"
    assert schedule({"sampling.tail_cache": "taylorseer:3"}) == "aligned"
    both = {"sampling.tail_cache": "first_block:0.08", "sampling.tail_weights": "float8"}
    assert schedule(both) == "aligned"


def test_settings_that_default_to_others():
    config = load_config("g2rpo", {"sampling.guidance_scale": 2.0, "sampling.batch_size": 9})
    assert (config.eval_guidance, config.micro_batch_size) == (2.0, 9)
    own = {"evaluation.guidance_scale": 0.0, "training.micro_batch_size": 3}
    config = config.with_changes(own)
    assert (config.eval_guidance, config.micro_batch_size) == (0.0, 3)


def steps_of(config, step):
    """The stochastic grid steps of a training step."""
    tree = config.tree(step)
    return set((tree.grid_index[tree.stochastic] - 1).tolist())


def test_the_tree_follows_the_step_and_the_seed():
    config = load_config("mixgrpo", {"method.window_interval": 1, "method.window_size": 2})
    assert steps_of(config, 1) == {0, 1}
    assert steps_of(config, 2) == {1, 2}
    random = config.with_changes({"method.window_schedule": "random"})
    seeds = [random.with_changes({"runtime.seed": seed}) for seed in range(4)]
    assert len({frozenset(steps_of(config, 1)) for config in seeds}) > 1


def test_settings_cannot_be_changed_in_place():
    config = load_config("g2rpo")
    for section, key in ((config.training, "max_steps"), (config.method, "eta"), (config, "name")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 1)


def test_the_values_of_a_configuration_are_plain():
    for name in METHODS:
        values = load_config(name).to_dict()
        assert json.loads(json.dumps(values)) == values
        assert yaml.safe_load(yaml.safe_dump(values)) == values

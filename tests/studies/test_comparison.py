"""Comparisons are loaded, planned and priced before anything runs."""

import ast
from pathlib import Path

import pytest
import yaml

import flowgrain.studies
from flowgrain.methods import METHODS
from flowgrain.settings import SettingsError
from flowgrain.studies.comparison import Comparison, comparison_names, load_comparison
from flowgrain.studies.entries import plan_entries
from flowgrain.studies.results import read_comparison

SMALL = {
    "name": "small",
    "methods": {"g2rpo": {"method": {"granularities": [1]}}, "mixgrpo": {"method.window_size": 1}},
    "rewards": {"oracle": ["oracle"]},
    "seeds": [1, 2],
    "budget": 300,
    "common": {
        "method": {"group_size": 3, "updates_per_rollout": 1},
        "sampling": {"num_steps": 4},
        "training": {"prompts_per_step": 2},
        "evaluation": {"num_prompts": 4, "num_steps": 2},
    },
    "measurement": {"num_steps": [2, 3], "num_prompts": 4},
    "curve_points": 1,
}


@pytest.fixture
def small(tmp_path):
    """A function that writes a comparison file and loads it."""

    def load(changes=(), **given) -> Comparison:
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump({**SMALL, **dict(changes)}))
        return load_comparison(file, **given)

    return load


def test_the_budget_is_used_and_not_exceeded(small):
    for entry in plan_entries(small()):
        of_step = entry.units / entry.config.training.max_steps
        assert entry.units <= 300 < entry.units + 1.5 * of_step, entry.name
    for entry in plan_entries(small(unit="updates", budget=3)):
        assert entry.config.training.max_steps == 3
    for entry in plan_entries(small(unit="seconds", budget=7)):
        assert entry.config.training.max_seconds == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 10}, r"budget=10: too small for one .* 'g2rpo'. Use at least \d+ passes"),
        ({"budget": -1}, "budget=-1: input should be greater than 0"),
        ({"unit": "steps"}, "unit='steps'"),
        ({"seeds": [-1]}, "seeds.0=-1: input should be greater than or equal to 0"),
        ({"methods": ["g2rp"]}, "Did you mean 'g2rpo'"),
        ({"methods": ["g2rpo", "G2RPO"]}, "'g2rpo' occurs twice"),
        ({"rewards": [["oracle"], ["oracle"]]}, "oracle occurs twice"),
        ({"overrides": ["runtime.seed=3"]}, "runtime.seed=3: the comparison sets this"),
        ({"overrides": ["method.name=g2rpo"]}, "method.name=g2rpo: the comparison sets this"),
        ({"overrides": ["sampling.num_step=3"]}, "methods.g2rpo: .*'sampling.num_steps'"),
        ({"changes": {"methods": {"mixgrpoo": {}}}}, "Did you mean 'mixgrpo'"),
        ({"changes": {"methods": {"a": {"extends": "b"}}}}, "methods.a.extends=b"),
        ({"changes": {"methods": {"a": {"extends": "a"}}}}, "methods.a.extends: a -> a is a cycle"),
        (
            {"changes": {"methods": {"a": {"extends": "b"}, "b": {"extends": "a"}}}},
            "methods.a.extends: a -> b -> a is a cycle",
        ),
        ({"changes": {"name": ".."}}, "name='..': string should match pattern"),
        ({"changes": {"name": "."}}, "name='.': string should match pattern"),
        ({"changes": {"methods": {"g2rpo": 3}}}, "methods.g2rpo=3: not a mapping"),
        ({"changes": {"common": {"training": {"max_steps": 3}}}}, "common: training.max_steps=3"),
        ({"changes": {"buget": 3}}, "Did you mean 'budget'"),
        ({"changes": {"measurement": {"num_step": 3}}}, "Did you mean 'measurement.num_steps'"),
        (
            {"changes": {"methods": {x: {"method": {"name": "g2rpo"}} for x in ("a b", "a_b")}}},
            r"Two runs have the name 'a_b\+oracle\+1'",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_the_fix(small, given, message):
    with pytest.raises(SettingsError, match=message):
        plan_entries(small(**given))


def test_an_unknown_comparison_or_directory(tmp_path):
    with pytest.raises(SettingsError, match="Did you mean 'quick'"):
        load_comparison("quik")
    with pytest.raises(SettingsError, match=r"no comparison\.yaml"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.yaml").write_text("comparison: {eval_steps: [1]}\n")
    with pytest.raises(SettingsError, match="not a comparison of this version"):
        read_comparison(tmp_path)


def test_files_that_extend_each_other(tmp_path):
    for name, other in (("a", "b"), ("b", "a"), ("start", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {tmp_path / other}.yaml\n")
    cycle = r"extends: \S+a\.yaml -> \S+b\.yaml -> \S+a\.yaml is a cycle"
    with pytest.raises(SettingsError, match=cycle):
        load_comparison(tmp_path / "start.yaml")


def test_overrides_win_and_methods_keep_their_own_settings():
    chosen = load_comparison(
        "full",
        methods=["MixGRPO", "densegrpo", "branchgrpo"],
        overrides=["optimizer.learning_rate=0.5", "method.split_steps=[0]"],
    )
    assert chosen.methods["mixgrpo"]["method"]["window_size"] == 2
    assert len(chosen.methods["densegrpo"]["method"]["psi"]) == 8
    assert chosen.methods["branchgrpo"] == {}  # not in the comparison: the values of its paper
    rates = load_comparison("full", methods=["mixgrpo"], overrides=["optimizer.learning_rate=0.5"])
    assert {e.config.optimizer.learning_rate for e in plan_entries(rates)} == {0.5}


def test_reward_sets_from_names():
    comparison = load_comparison("quick", rewards=[["towers"], ["towers", "preference"]], seeds=[7])
    assert list(comparison.rewards) == ["towers", "towers+preference"]
    names = {e.name for e in plan_entries(comparison)}
    assert "g2rpo+towers+preference+7" in names
    assert len(names) == 6


def test_a_method_extends_another_one(small):
    methods = {
        "g2rpo": {"optimizer.learning_rate": 1e-3},
        "g2rpo {1,2}": {"extends": "g2rpo", "method": {"granularities": [1, 2]}},
    }
    both = {e.label: e.config for e in plan_entries(small({"methods": methods}))}
    assert both["g2rpo {1,2}"].optimizer.learning_rate == 1e-3
    assert both["g2rpo {1,2}"].method.granularities == (1, 2)
    assert both["g2rpo {1,2}"].method.name == "g2rpo"


def test_a_method_from_a_plugin_file(small, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from flowgrain.methods import register\n"
        "from flowgrain.methods.g2rpo import G2RPO\n"
        "@register\n"
        "class Mine(G2RPO):\n"
        "    name = 'studies_plugin'\n"
    )
    comparison = small(methods=["studies_plugin"], plugins=[plugin])
    assert {e.config.method.name for e in plan_entries(comparison)} == {"studies_plugin"}
    assert {e.config.runtime.plugins for e in plan_entries(comparison)} == {(str(plugin),)}


def test_plugins_of_a_file_are_relative_to_the_file(small, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for name in ("first.py", "second.py"):
        (tmp_path / name).write_text("")
    plugins = {"common": {"runtime.plugins": ["first.py"], **SMALL["common"]}}
    configs = [e.config for e in plan_entries(small(plugins, plugins=["../second.py"]))]
    expected = tuple(str(tmp_path / name) for name in ("first.py", "second.py"))
    assert {config.runtime.plugins for config in configs} == {expected}
    methods = {"g2rpo": {"runtime": {"plugins": ["second.py"]}}}
    configs = [e.config for e in plan_entries(small({"methods": methods}))]
    assert {config.runtime.plugins for config in configs} == {expected[1:]}


STEPS_OF_FULL = {
    "g2rpo": 32,
    "densegrpo": 21,
    "mixgrpo": 165,
    "flow_grpo": 48,
    "dancegrpo": 84,
    "tempflow_grpo": 37,
    "diffusionnft": 43,
}
"""Training steps that the budget of the published comparison paid for, with the reward `towers`."""


@pytest.mark.slow
def test_bundled_comparisons_can_be_planned():
    planned = {name: plan_entries(load_comparison(name)) for name in comparison_names()}
    assert {name: len(entries) for name, entries in planned.items()} == {
        "full": 7 * 2 * 5, "quick": 6, "sweep": 28, "ablations": 55,
        "family": 21 * 3, "family_sweep": 18 * 3,
    }  # fmt: skip
    steps = {
        e.label: e.config.training.max_steps for e in planned["full"] if e.reward_set == "towers"
    }
    assert steps == STEPS_OF_FULL
    assert {e.config.evaluation.split for e in planned["sweep"]} == {"validation"}
    seeds = {name: {e.config.runtime.seed for e in planned[name]} for name in ("full", "sweep")}
    assert not seeds["full"] & seeds["sweep"]
    for entry in planned["ablations"]:
        if entry.label.startswith("densegrpo"):
            assert (entry.config.method.psi is None) == (entry.label == "densegrpo uniform")


def test_no_method_is_named_in_the_code():
    folder = Path(flowgrain.studies.__file__).parent
    named = {
        node.value
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in list(METHODS)
    }
    assert not named

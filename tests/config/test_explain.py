"""The error of every wrong setting names its full path, its value and the fix, in one line."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain import METHODS, SettingsError, load_config
from flowgrain.config.explain import setting_paths
from flowgrain.config.load import parse_overrides, validate
from flowgrain.config.schema import Config

NOT_A_SETTING = {
    "sampling.num_step": "sampling.num_steps",
    "sampler.num_steps": "sampling.num_steps",  # an unknown section
    "num_steps": "sampling.num_steps",  # without its section
    "learning_rate": "optimizer.learning_rate",
    "training.learning_rate": "optimizer.learning_rate",  # in the wrong section
    "training.num_prompts": "evaluation.num_prompts",
    "evaluation.eval_prompts": "data.eval_prompts",
    "model.heigth": "model.height",
    "lora.alfa": "lora.alpha",
    "runtime.sead": "runtime.seed",
    "optimiser.betas": "optimizer.betas",
    "method.calibration.round": "method.calibration.rounds",  # in a section of a method
    "granularity": "method.granularities",
}


@pytest.mark.parametrize(("path", "close"), NOT_A_SETTING.items())
def test_an_unknown_setting_names_the_full_path_of_the_nearest(path, close):
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", {path: 1})
    assert str(error.value) == f"{path} is not a setting. Did you mean {close!r}?"


@pytest.mark.parametrize("path", ["qwertzuiop", "qwertzuiop.asdfghjkl", "--out"])
def test_an_unknown_setting_without_a_near_one_names_the_sections(path):
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", [f"{path}=1"])
    sections = ", ".join(Config.model_fields)
    assert str(error.value) == f"{path} is not a setting. Sections: {sections}."


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("g2rpo", "granularity", "Did you mean 'method.granularities'?"),
        ("flow_grpo", "granularities", "Remove it, or use method 'g2rpo'."),
        ("g2rpo", "soft_clip", "Remove it, or use method 'vgrpo'."),
        ("diffusionnft", "sde_type", "Remove it, or use method "),
        ("g2rpo", "split_fan", "Remove it, or use method 'branchgrpo'."),
        ("g2rpo", "completion_steps", "Remove it, or use method 'densegrpo' or "),
    ],
)
def test_an_option_of_another_method_names_both(method, option, message):
    with pytest.raises(SettingsError) as error:
        load_config(method, {f"method.{option}": 1})
    assert str(error.value).startswith(f"Method {method!r} has no option {option!r}. {message}")


def as_typed(value):
    """`value` as it is written in YAML. Texts that start with another character have quotes."""
    if isinstance(value, str) and not value[:1].isalpha():
        return repr(value)
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0].replace(".nan", "nan")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learning_rate", "fast", "must be a number"),
        ("sampling.num_steps", "4", "must be a whole number, such as 40"),
        ("sampling.num_steps", 4.5, "must be a whole number, such as 40"),
        ("sampling.num_steps", True, "must be a whole number, such as 40"),
        ("sampling.shift", "automatic", "must be a number, or 'auto'"),
        ("model.t5", "yes", "must be true or false"),
        ("data.prompts", 1, "must be a text"),
        ("runtime.device", "tpu", "must be 'auto', 'cpu' or 'cuda'"),
        ("runtime.trackers", "wandb", "must be a list. Write runtime.trackers=[wandb]"),
        ("rewards", "oracle", "must be a list. Write rewards=[oracle]"),
        ("rewards", "oracle:nan", "must be a list. Write rewards=[oracle]"),
        ("rewards", ":1", "must be a list. Write rewards=[oracle]"),
        ("evaluation.rewards", "clip", "must be a list. Write evaluation.rewards=[clip]"),
        ("method.sde_steps", "x", "must be a list. Write method.sde_steps=[1]"),
        ("optimizer.betas", 0.9, "must be a list. Write optimizer.betas=[0.9,0.9]"),
        ("rewards", [], "must not be empty"),
        ("training", 3, "is a section. Write training.KEY=VALUE"),
        ("method.updates_per_rollout", "all", "must be a whole number, such as 40, or 'per_step'"),
        ("method.calibration", 3, "is a section. Write method.calibration.KEY=VALUE"),
        ("optimizer.learning_rate", float("nan"), "must be a finite number"),
    ],
)
def test_a_wrong_type(path, value, message):
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", {path: value})
    assert f"{error.value} ".startswith(f"{path}={as_typed(value)}: {message}. ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sampling.num_steps", 1, "must be greater than or equal to 2"),
        ("sampling.shift_terminal", 1.0, "must be less than 1"),
        ("optimizer.learning_rate", 0, "must be greater than 0"),
        ("training.ema_decay", 1.0, "must be less than 1"),
        ("training.max_failed_rewards", 1.5, "must be less than or equal to 1"),
        ("evaluation.num_prompts", 0, "must be greater than or equal to 1"),
        ("model.height", 4, "must be greater than or equal to 8"),
        ("lora.rank", -1, "must be greater than or equal to 0"),
        ("sampling.tail_cache", "taylorseer:1", "string should match pattern"),
        ("sampling.tail_cache", "first_block:2", "string should match pattern"),
        ("name", "a b", "string should match pattern"),
        ("method.group_size", 1, "must be greater than or equal to 2"),
        ("method.updates_per_rollout", 0, "must be at least 1, or per_step"),
        ("method.granularities", [1, 1], "contains a value twice. Use [1]"),
        ("method.sde_steps", [], "must not be empty. Remove it to use the method's default"),
    ],
)
def test_a_value_out_of_range(path, value, message):
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", {path: value})
    assert str(error.value).startswith(f"{path}={as_typed(value)}: {message}")


def test_messages_end_with_the_description_of_the_setting():
    cases = {
        "sampling.num_steps": (1, "sampling.num_steps=1", "Sampling steps during training (T). "),
        "optimizer.betas": ([0.9, 1.0], "optimizer.betas.1=1.0", "Decay rates of the moment"),
        "runtime.trackers": (["x"], "runtime.trackers.0=x", "Trackers that receive copies of the"),
        "method.group_size": (1, "method.group_size=1", "Samples per prompt that are compared"),
        "method.calibration.rounds": (0, "method.calibration.rounds=0", "Number of rounds."),
        "rewards": (
            [{"name": "oracle", "batch_size": 0}],
            "rewards[oracle].batch_size=0",
            "Images in one call of the reward.",
        ),
        "evaluation.rewards": (
            [{"name": "oracle", "weight": "x"}],
            "evaluation.rewards[oracle].weight=x",
            "Weight of this reward",
        ),
    }
    for path, (value, beginning, description) in cases.items():
        with pytest.raises(SettingsError) as error:
            load_config("g2rpo", {path: value})
        assert str(error.value).startswith(beginning), path
        assert description in str(error.value), path


def test_rewards_are_a_list_of_different_names():
    with pytest.raises(SettingsError, match=r"contains 'oracle' twice. List every reward once"):
        load_config("g2rpo", {"rewards": ["oracle", {"name": "oracle", "weight": 2.0}]})
    with pytest.raises(SettingsError, match=r"rewards\.0\.name: required, but not set"):
        load_config("g2rpo", {"rewards": [{"weight": 1.0}]})
    for word in ("rewards.oracle.weight=0.5", "rewards.0.weight=0.5"):
        with pytest.raises(SettingsError, match=r"rewards is a list. Write the whole list: "):
            load_config("g2rpo", [word])


def test_a_model_without_default_rewards_says_so():
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", {"model.name": "zimage"})
    assert str(error.value) == (
        "rewards: required, because model.name=zimage has no default rewards. Write rewards=[clip]."
    )
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", {"model.name": "flx"})
    assert str(error.value) == ("model.name=flx: there is no such backbone. Did you mean 'flux'?")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            "g2rpo",
            {"method.sde_steps": [0, 15]},
            r"method\.sde_steps=\[0, 15\]: .*sampling\.num_steps=16.*Use 0 to 14\.$",
        ),
        (
            "g2rpo",
            {"method.granularities": [16]},
            r"method\.granularities=\[16\]: 16 .*sampling\.num_steps=16\. Use 1 .*to 15\.$",
        ),
        (
            "mixgrpo",
            {"method.window_size": 30},
            r"method\.window_size=30: .*sampling\.num_steps=25 .*Use 1 to 24\.$",
        ),
        (
            "branchgrpo",
            {"method.group_size": 5},
            r"method\.group_size=5: .*give 16 leaves\. Use method\.group_size=16\.$",
        ),
        (
            "g2rpo",
            {"method.psi": [0.5] * 16},
            r"method\.psi=\[.*no effect with method\.sde_type=flow_sde\. Remove it, or use .*\.$",
        ),
        (
            "g2rpo",
            {"method.sde_type": "cps", "method.eta": 1.5},
            r"method\.eta=1\.5: method\.sde_type=cps .*Use at most 1\.$",
        ),
        (
            "g2rpo",
            {"method.best_of": 3},
            r"method\.best_of=3: not an even number up to method\.group_size=12\. .*or 0 .*\.$",
        ),
        (
            "diffusionnft",
            {"method.updates_per_rollout": "per_step"},
            r"method\.updates_per_rollout=per_step: .*trains no steps.*\.$",
        ),
        (
            "flow_grpo",
            {"sampling.tail_cache": "taylorseer:2"},
            r"sampling\.tail_cache=taylorseer:2: has no effect on a tail of 1 step\. Remove it",
        ),
        (
            "g2rpo",
            {"runtime.compile": "inductor", "sampling.tail_cache": "taylorseer:2"},
            r"runtime\.compile=inductor: sampling\.tail_cache=taylorseer:2 .*Remove one of the two",
        ),
        (
            "g2rpo",
            {"runtime.compile": "inductor", "model.name": "zimage", "rewards": ["clip"]},
            r"runtime\.compile=inductor: .*model\.name=zimage .*Remove runtime\.compile\.$",
        ),
    ],
)
def test_an_impossible_combination_names_both_settings(source, changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        load_config(source, changes)
    assert "\n" not in str(error.value)


def test_a_method_is_a_section_and_must_exist():
    with pytest.raises(SettingsError, match=r"write method\.name=flow_grpo instead of method="):
        load_config("g2rpo", {"method": "flow_grpo"})
    with pytest.raises(SettingsError, match=r"there is no method 'g2rp'\. Did you mean 'g2rpo'"):
        load_config("g2rpo", {"method.name": "g2rp"})
    with pytest.raises(SettingsError, match=r"required, but not set. Known methods: .*g2rpo"):
        load_config("g2rpo", {"method.name": None})


def test_every_wrong_setting_has_its_own_line():
    with pytest.raises(SettingsError) as error:
        load_config(
            "g2rpo",
            {"sampling.nums": 1, "training.max_stepz": 2, "optimizer.learning_rate": -1.0},
        )
    lines = str(error.value).splitlines()
    assert [line.split(" ")[0].split("=")[0] for line in lines] == [
        *("sampling.nums", "optimizer.learning_rate", "training.max_stepz")
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "sampling.num_steps",
            "'sampling.num_steps' is not an override. Write sampling.num_steps=VALUE.",
        ),
        ("=3", "'=3' is not an override. Write section.key=VALUE."),
        ("sampling.num_steps=[1", "sampling.num_steps=[1: not a YAML value (expected ',' or ']')."),
        (
            "training.max_steps.x=1",
            "training.max_steps.x=1: training.max_steps has no parts. Write training.max_steps=1.",
        ),
    ],
)
def test_a_word_that_is_no_override(word, message):
    with pytest.raises(SettingsError) as error:
        load_config("g2rpo", [word])
    assert str(error.value).startswith(message)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
paths = st.sampled_from(list(setting_paths(METHODS.get("g2rpo")))) | st.text(max_size=10)


@settings(deadline=None)
@given(st.dictionaries(paths, plain, max_size=4))
def test_any_values_are_a_configuration_or_an_error(values):
    try:
        config = load_config("g2rpo", values)
    except SettingsError as error:
        assert str(error)
        assert not re.search(r"pydantic|OmegaConf", str(error))
    else:
        assert validate(config.to_dict()) == config


@settings(deadline=None)
@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, paths, st.text(max_size=20))))
def test_any_words_are_overrides_or_an_error(words):
    try:
        parse_overrides(words)
    except SettingsError as error:
        assert str(error)

"""The options of the methods: documentation, errors, and options that change what is trained."""

import ast
import inspect
import re

import pytest
import torch
from toy_trainer import STEP, toy_config, toy_trainer

from flowgrain.config import load_config
from flowgrain.methods import (
    METHODS,
    ForwardProcess,
    Method,
    PolicyGradient,
    RewardGradient,
    register,
)
from flowgrain.settings import SettingsError
from flowgrain.training.load import check_gradients, load_rewards

BUILT_IN = {
    name: METHODS.get(name)
    for name in METHODS
    if METHODS.get(name).__module__.startswith("flowgrain.")
}
SOURCE = re.compile(
    r"#.*(section|appendix|eq\.|published code|paper|own choice|Flow-Factory|reports)"
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_is_documented(name):
    method = BUILT_IN[name]
    assert method.name == name
    assert method.__doc__
    assert method.__doc__ != Method.__doc__
    assert "title" in vars(method)
    assert re.fullmatch(r"\d{4}\.\d{5}", method.paper)
    assert method.summary.endswith(".")
    assert issubclass(method, PolicyGradient | ForwardProcess | RewardGradient)
    for option, field in method.model_fields.items():
        assert field.description, option
        assert field.description.endswith("."), option


def test_titles_are_distinct():
    titles = [method.title for method in BUILT_IN.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_changed_default_has_a_source(name):
    """A default that a method's file changes has a comment that names its source."""
    module = inspect.getmodule(BUILT_IN[name])
    lines = inspect.getsource(module).splitlines()
    missing = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            values = isinstance(statement, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "config_defaults" for t in statement.targets
            )
            # Own options are documented by `Setting`.
            changed = isinstance(statement, ast.AnnAssign) and not isinstance(
                statement.value, ast.Call
            )
            code = lines[statement.lineno - 1 : statement.end_lineno]
            if (values or changed) and not any(SOURCE.search(line) for line in code):
                missing.append(code[0].strip())
    assert not missing


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_papers_values_can_be_used(name):
    """A method's name alone is a valid configuration, with the defaults of its class."""
    config = load_config(name, {"model.name": "sd3"})
    assert config.method == BUILT_IN[name]()
    assert load_config(name).method == config.method  # the bundled model, which has no LoRA
    for section, values in BUILT_IN[name].config_defaults.items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


PAPER_VALUES = {
    "g2rpo": {"granularities": (1, 2, 3), "group_size": 12, "eta": 0.7, "clip_range": 1e-4},
    "flow_grpo": {
        "group_size": 24,
        "std_scope": "global",
        "std_unbiased": False,
        "std_epsilon": 1e-4,
        "reward_mix": "reward",
        "updates_per_rollout": 2,
        "kl_weight": 0.04,
        "kl_form": "published",
    },
    "flow_grpo_fast": {
        "group_size": 24,
        "updates_per_rollout": 2,
        "sde_type": "cps",
        "eta": 0.8,
        "cps_log_prob": "squared_error",
        "clip_range": 1e-5,
        "kl_weight": 0.0,
        "window_size": 3,
        "window_schedule": "random",
        "window_region": "first_half",
    },
    "densegrpo": {
        "group_size": 24,
        "sde_type": "calibrated_sde",
        "std_scope": "group",
        "std_unbiased": True,
        "updates_per_rollout": 1,
        "kl_weight": 0.04,
        "kl_form": "published",
    },
    "dancegrpo": {
        "sde_type": "dance_sde",
        "eta": 0.3,
        "shared_noise": True,
        "timestep_fraction": 0.6,
        "updates_per_rollout": 3,
        "reward_weights": "as_given",
    },
    "mixgrpo": {
        "shared_noise": True,
        "window_size": 4,
        "window_interval": 25,
        "tail_ratio": 1.0,
        "tail_order": 1,
        "updates_per_rollout": 4,
        "reward_weights": "sum_to_one",
    },
    "mixgrpo_flash": {"window_size": 4, "tail_order": 2, "tail_ratio": 0.4},
    "mixgrpo_flash_star": {"tail_order": 2, "tail_ratio": 0.2, "window_schedule": "frozen"},
    "tempflow_grpo": {
        "group_size": 6,
        "seeds": 4,
        "comparison": "parent",
        "std_scope": "group",
        "updates_per_rollout": 2,
        "kl_weight": 0.004,
        "kl_form": "gaussian",
    },
    "grpo_guard": {
        "group_size": 24,
        "updates_per_rollout": 2,
        "clip_range": 2e-6,
        "kl_weight": 0.0,
        "std_scope": "group",
    },
    "branchgrpo": {
        "group_size": 16,
        "sde_type": "dance_sde",
        "eta": 0.3,
        "clip_range": 1e-3,
        "std_epsilon": 1e-8,
        "split_steps": (0, 3, 6, 9),
        "updates_per_rollout": 37,
    },
    "diffusionnft": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 1e-4,
        "tail_order": 2,
        "timestep_fraction": 0.99,
        "beta": 1.0,
        "decay_rate": 0.001,
        "decay_start": 0,
        "max_decay": 0.5,
        "std_scope": "global",
        "reward_mix": "reward",
    },
    "draft": {"group_size": 1, "last_steps": 1, "lv_samples": 0, "kl_weight": 0.0},
    "refl": {
        "group_size": 1,
        "first_step": 0.75,
        "reward_cap": 2.0,
        "loss_scale": 1e-3,
        "kl_weight": 0.0,
    },
}
PAPER_VALUES |= {
    "mend": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 0.0,
        "tail_order": 2,
        "trained_sigma": 0.278,
        "etas": (0.1, 0.2, 0.4),
        "cap_quantile": 0.75,
        "global_quantile": 0.5,
        "global_rate": 0.1,
        "keep_weight": 10.0,
        "error": "mse",
        "tau": 0.1,
        "tau_range": (1e-3, 10.0),
        "acceptance_range": (0.3, 0.6),
        "tau_factor": 1.5,
        "max_decay": 0.5,
        "decay_rate": 0.001,
        "decay_start": 0,
    },
    "awm": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 0.003,
        "ema_weight": 1.0,
        "draws": 6,
        "levels": "binned_grid",
        "weighting": "generalized_huber",
        "power": 0.25,
        "clip_range": 1.0,
        "advantage_clip": 5.0,
        "advantage_scale": 1.0,
        "std_scope": "global",
        "ratio": "draw",
        "kl_weighting": "uniform",
        "max_decay": 0.3,
        "decay_rate": 0.001,
    },
    "ram": {
        "group_size": 24,
        "eta": 100.0,
        "draws": 8,
        "levels": "toward_noise",
        "kl_weight": 0.0,
        "std_scope": "global",
        "residual": "old",
        "max_decay": 0.9,
        "decay_rate": 0.01,
    },
    "flowawr": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 1e-4,
        "tail_order": 2,
        "timestep_fraction": 0.99,
        "advantage_clip": 3.0,
        "logit_clip": 5.0,
        "gating": "soft",
        "max_decay": 0.5,
        "decay_rate": 0.001,
        "std_scope": "global",
    },
    "vgrpo": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 0.0,
        "draws": 4,
        "levels": "binned_grid",
        "shared_draws": True,
        "soft_clip": 3.0,
    },
    "dgpo": {
        "group_size": 24,
        "kl_weight": 0.02,
        "draws": 4,
        "levels": "grid",
        "level_range": (0.0, 0.5),
        "shared_draws": True,
        "beta": 100.0,
        "clip_range": 0.01,
        "clip_kl": False,
        "anchor": "reference",
        "max_decay": 0.3,
        "std_scope": "group",
    },
    "diffusion_dpo": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 0.0,
        "draws": 39,
        "levels": "logit_normal",
        "shared_draws": True,
        "beta": 100.0,
        "reference_every": 40,
    },
    "sft": {
        "group_size": 24,
        "updates_per_rollout": 1,
        "kl_weight": 0.0,
        "draws": 1,
        "levels": "logit_normal",
        "shared_draws": False,
    },
    "crd": {
        "levels": "binned_grid",
        "draws": 9,
        "group_size": 24,
        "updates_per_rollout": 2,
        "kl_weight": 0.1,
        "beta": 1.0,
        "temperature": None,
        "matching": "mse",
        "normalized_error": True,
        "adaptive_kl": True,
        "decay_rate": 0.005,
        "decay_start": -50,
        "max_decay": 0.999,
    },
}
PAPER_VALUES |= {
    "flow_dppo": {
        "group_size": 16,
        "updates_per_rollout": 2,
        "trust_region": 1e-5,
        "kl_weight": 0.0,
        "std_scope": "global",
        "sde_type": "flow_sde",
        "eta": 0.7,
    },
    "tp_grpo": {
        "group_size": 24,
        "updates_per_rollout": 2,
        "sde_type": "cps",
        "eta": 0.7,
        "cps_log_prob": "squared_error",
        "clip_range": 1e-5,
        "kl_weight": 1e-4,
        "std_scope": "group",
        "std_epsilon": 1e-4,
        "turning_points": "consistent",
        "balanced": True,
        "completion_steps": "all",
    },
    "stepwise_flow_grpo": {
        "sde_type": "flow_sde",
        "completion_steps": 1,
        "comparison": "prompt",
        "dense_reward": "gain",
    },
    "e_grpo": {
        "group_size": 12,
        "sde_steps": (0, 1, 2, 4),
        "merged_steps": (1, 1, 2, 3),
        "eta": 0.7,
        "clip_range": 1e-4,
        "updates_per_rollout": "per_step",
    },
    "ddpo": {
        "estimator": "ppo",
        "clip_range": 1e-4,
        "updates_per_rollout": 4,
        "buffer_size": 16,
        "min_count": 16,
        "std_unbiased": False,
        "std_epsilon": 1e-6,
        "kl_weight": 0.0,
        "advantage_clip": 5.0,
    },
}
NUM_STEPS = {"g2rpo": 16, "dancegrpo": 16, "branchgrpo": 20, "draft": 50, "refl": 40}
NUM_STEPS |= dict.fromkeys(("mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star"), 25)
NUM_STEPS |= {
    "diffusion_dpo": 40,
    "sft": 40,
    "awm": 14,
    "ram": 20,
    "vgrpo": 40,
    "e_grpo": 16,
    "ddpo": 50,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_defaults_are_those_of_the_papers(name):
    config = load_config(name)
    values = {option: getattr(config.method, option) for option in PAPER_VALUES[name]}
    assert values == PAPER_VALUES[name]
    assert config.sampling.num_steps == NUM_STEPS.get(name, 10)


# ---------------------------------------------------------------------- errors

UNKNOWN = [
    (
        "flow_grpo",
        "granularities=[1,2]",
        "Method 'flow_grpo' has no option 'granularities'. Remove it, or use method 'g2rpo'.",
    ),
    (
        "diffusionnft",
        "clip_range=0.1",
        "Method 'diffusionnft' has no option 'clip_range'. Remove it, or use method ",
    ),
    ("g2rpo", "window_size=2", "Method 'g2rpo' has no option 'window_size'. Remove it, or use "),
    (
        "g2rpo",
        "granularity=[1]",
        "Method 'g2rpo' has no option 'granularity'. Did you mean 'method.granularities'?",
    ),
]
IMPOSSIBLE = [  # method, overrides, setting and value in the message, fix in the message
    ("g2rpo", ["sde_steps=[0,15]"], "method.sde_steps=[0, 15]", "0 to 14"),
    ("g2rpo", ["sde_steps=[]"], "method.sde_steps=[]", "must not be empty"),
    ("g2rpo", ["granularities=[0]"], "method.granularities=[0]", "to 15."),
    ("g2rpo", ["granularities=[2,2]"], "method.granularities=[2, 2]", "Use [2]"),
    ("g2rpo", ["group_size=1"], "method.group_size=1", "greater than or equal to 2"),
    ("g2rpo", ["best_of=3"], "method.best_of=3", "group_size=12"),
    ("g2rpo", ["best_of=14"], "method.best_of=14", "group_size=12"),
    ("g2rpo", ["updates_per_rollout=0"], "method.updates_per_rollout=0", "at least 1"),
    ("g2rpo", ["sde_type=cps", "eta=1.5"], "method.eta=1.5", "at most 1"),
    ("g2rpo", ["psi=[0.5]"], "method.psi", "sde_type=calibrated_sde"),
    ("g2rpo", ["sde_type=calibrated_sde", "psi=[0.5]"], "method.psi", "16"),
    ("g2rpo", ["calibration.rounds=3"], "method.calibration", "sde_type=calibrated_sde"),
    ("flow_grpo", ["comparison=parent"], "method.comparison=parent", "method.comparison=step"),
    ("g2rpo", ["cps_log_prob=squared_error"], "method.cps_log_prob=squared_error", "sde_type=cps"),
    ("tp_grpo", ["kl_form=published"], "method.kl_form=published", "method.sde_type=cps"),
    (
        "grpo_guard",
        ["sde_type=cps", "cps_log_prob=squared_error"],
        "method.cps_log_prob=squared_error",
        "method.cps_log_prob=gaussian",
    ),
    ("densegrpo", ["sde_type=cps", "sde_steps=[9]"], "method.sde_steps=[9]", "0 to 8"),
    ("densegrpo", ["completion_steps=0"], "method.completion_steps=0", "at least 1, or all"),
    ("mixgrpo", ["window_size=25"], "method.window_size=25", "1 to 24"),
    ("flow_grpo_fast", ["window_size=6"], "method.window_size=6", "1 to 5"),
    ("flow_grpo", ["tail_order=2"], "method.tail_order=2", "before 8"),
    ("dancegrpo", ["tail_ratio=0.5"], "method.tail_ratio=0.5", "before 14"),
    ("branchgrpo", ["group_size=8"], "method.group_size=8", "group_size=16"),
    ("branchgrpo", ["split_steps=[0,19]"], "method.split_steps=[0, 19]", "stochastic step"),
    (
        "branchgrpo",
        ["node_value=softmax", "sde_type=cps", "cps_log_prob=squared_error"],
        "method.node_value=softmax",
        "method.cps_log_prob=gaussian",
    ),
    ("flow_dppo", ["clip_range=1e-3"], "method.clip_range=0.001", "use method.trust_region"),
    ("e_grpo", ["merged_steps=[1,2]"], "method.merged_steps=[1, 2]", "Use 4"),
    ("e_grpo", ["merged_steps=[1,0,1,1]"], "method.merged_steps=[1, 0, 1, 1]", "at least 1"),
    ("e_grpo", ["merged_steps=[1,1,1,12]"], "method.merged_steps=[1, 1, 1, 12]", "at most 11"),
    ("ddpo", ["group_size=17"], "method.group_size=17", "Use method.buffer_size=17"),
    ("ddpo", ["min_count=17"], "method.min_count=17", "at most 16"),
    ("ddpo", ["std_scope=group"], "method.std_scope=group", "Remove it"),
    ("ddpo", ["comparison=prompt"], "method.comparison=prompt", "Remove it"),
    ("ddpo", ["reward_mix=advantage"], "method.reward_mix=advantage", "reward_mix=reward"),
    ("ddpo", ["estimator=score"], "method.updates_per_rollout=4", "updates_per_rollout=1"),
    (
        "ddpo",
        ["estimator=score", "updates_per_rollout=1", "clip_range=0.1"],
        "method.clip_range=0.1",
        "method.estimator=ppo",
    ),
    (
        "diffusionnft",
        ["updates_per_rollout=per_step"],
        "method.updates_per_rollout=per_step",
        "Use a number",
    ),
    ("draft", ["updates_per_rollout=per_step"], "method.updates_per_rollout=per_step", "a number"),
    ("draft", ["updates_per_rollout=2"], "method.updates_per_rollout=2", "group_size=1"),
    ("draft", ["last_steps=51"], "method.last_steps=51", "1 to 50"),
    ("draft", ["last_steps=2", "lv_samples=2"], "method.lv_samples=2", "method.last_steps=1"),
    ("draft", ["std_scope=global"], "method.std_scope=global", "Remove it"),
    ("refl", ["tail_order=2"], "method.tail_order=2", "Remove it"),
    ("mend", ["updates_per_rollout=per_step"], "method.updates_per_rollout=per_step", "a number"),
    ("mend", ["etas=[]"], "method.etas=[]", "positive numbers"),
    ("mend", ["etas=[0.1,0]"], "method.etas=[0.1, 0.0]", "positive numbers"),
    ("mend", ["tau=20"], "method.tau=20", "method.tau_range=[0.001, 10.0]"),
    ("mend", ["tau_range=[0,1]"], "method.tau=0.1", "must be positive"),
    ("mend", ["acceptance_range=[0.6,0.3]"], "method.acceptance_range=[0.6, 0.3]", "rising"),
    ("mend", ["acceptance_range=[0.9,5]"], "method.acceptance_range=[0.9, 5.0]", "0 and 1"),
    ("mend", ["std_epsilon=1e-4"], "method.std_epsilon=0.0001", "Remove it"),
    ("sft", ["std_scope=global"], "method.std_scope=global", "Remove it"),
    ("sft", ["advantage_clip=0.5"], "method.advantage_clip=0.5", "Remove it"),
    ("diffusion_dpo", ["std_epsilon=1"], "method.std_epsilon=1.0", "Remove it"),
    ("diffusion_dpo", ["advantage_clip=0.001"], "method.advantage_clip=0.001", "Remove it"),
    ("diffusion_dpo", ["shared_draws=false"], "method.shared_draws=False", "Use true"),
    ("dgpo", ["clip_range=null", "clip_kl=true"], "method.clip_kl=True", "method.clip_range=null"),
    ("dgpo", ["kl_weight=0", "clip_kl=true"], "method.clip_kl=True", "method.kl_weight=0"),
    (
        "ram",
        ["residual=trained", "max_decay=0.1"],
        "method.max_decay=0.1",
        "method.residual=trained",
    ),
    ("awm", ["weighting=uniform", "power=0.5"], "method.power=0.5", "method.weighting=uniform"),
    ("awm", ["ema_weight=0", "decay_rate=0.5"], "method.decay_rate=0.5", "method.ema_weight=0"),
    (
        "awm",
        ["ema_weight=0", "kl_weight=0", "kl_weighting=elbo"],
        "method.kl_weighting=elbo",
        "method.kl_weight=0",
    ),
    ("crd", ["kl_weight=0", "adaptive_kl=false"], "method.adaptive_kl=False", "Remove it"),
    ("refl", ["first_step=1"], "method.first_step=1", "less than 1"),
]


@pytest.mark.parametrize(("name", "override", "message"), UNKNOWN)
def test_an_option_of_another_method_is_an_error(name, override, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_config(name, [f"method.{override}"])


@pytest.mark.parametrize(("name", "overrides", "setting", "fix"), IMPOSSIBLE)
def test_an_impossible_option_is_an_error(name, overrides, setting, fix):
    with pytest.raises(SettingsError) as error:
        load_config(name, [f"method.{override}" for override in overrides])
    message = str(error.value)
    assert message.startswith(setting)
    assert fix in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "data", "option"),
    [
        ("sft", "images", "reward_mix=advantage"),
        ("sft", "images", "tail_order=2"),
        ("diffusion_dpo", "pairs", "reference_every=1"),
    ],
)
def test_an_option_without_effect_on_a_data_set_is_an_error(name, data, option):
    with pytest.raises(SettingsError, match=rf"method\.{option}: has no effect with data\.{data}"):
        load_config(name, [f"data.{data}=a.jsonl", f"method.{option}"])
    assert load_config(name, [f"method.{option}"]).data.kind is None


@pytest.mark.parametrize(
    ("name", "changes", "warning"),
    [
        ("dgpo", ["sampling.num_steps=2"], "method.draws=4: .* has only 1 levels"),
        ("vgrpo", ["method.levels=grid", "method.draws=100"], "method.draws=100: .* 40 levels"),
        ("draft", ["rewards=[oracle]"], r"rewards\[oracle\]: .* not differentiable"),
        ("mend", ["rewards=[pairwise]"], r"rewards\[pairwise\]: .* not differentiable"),
    ],
)
def test_what_a_run_does_not_do_is_a_warning(name, changes, warning):
    (found,) = load_config(name, changes).warnings()
    assert re.match(warning, found)
    assert not load_config(name, {"rewards": ["towers"]}).warnings()


def test_rewards_without_gradient_are_refused_with_a_fix():
    with pytest.raises(SettingsError, match=r"not differentiable\. Add the decorator .* to rgb"):
        check_gradients(load_config("draft").method, {"rgb": lambda images, prompts: 0})
    with pytest.raises(SettingsError, match=r"not differentiable\. Use clip, "):  # not its options
        load_rewards(load_config("draft", ["rewards=[pairwise]"]))


def test_an_unknown_method_is_an_error():
    with pytest.raises(SettingsError, match="Did you mean 'mixgrpo'"):
        load_config("demo", ["method.name=mixgrop"])


def test_names_are_found_whatever_their_capitals_and_separators():
    assert METHODS.get("DanceGRPO") is METHODS.get("dance-grpo") is METHODS.get("dancegrpo")
    assert type(load_config("Flow-GRPO").method) is METHODS.get("flow_grpo")


def test_a_method_needs_a_name_of_its_own():
    with pytest.raises(SettingsError, match="Nameless has no name"):

        @register
        class Nameless(PolicyGradient):
            """Without a name."""

    with pytest.raises(SettingsError, match="A method named 'g2rpo' already exists"):

        @register
        class Second(PolicyGradient):
            """With a name that is taken."""

            name = "g2rpo"


# ---------------------------------------------------------------------- effects


def test_best_of_trains_the_extremes(tmp_path):
    changes = {"method.group_size": 6, "method.best_of": 2, "method.kl_weight": 0.0}
    trainer = toy_trainer(toy_config("dancegrpo", changes), tmp_path)
    batch = trainer.collector.collect(STEP)
    groups = batch.tree.comparison_groups
    for group in range(groups.max() + 1):
        members = torch.from_numpy(groups == group)
        edge_weight, advantage = batch.edge_weight[members], batch.advantage[members]
        assert edge_weight.mean() == 1
        trained = set(advantage[edge_weight > 0].tolist())
        assert trained == {advantage.min().item(), advantage.max().item()}


def test_weights_of_rewards_that_are_divided_by_their_sum():
    rewards = [{"name": "oracle", "weight": 3.0}, {"name": "towers", "weight": 1.0}]
    config = load_config("mixgrpo", {"rewards": rewards})
    assert config.method.mix_weights(config.reward_weights) == {"oracle": 0.75, "towers": 0.25}
    as_given = config.with_changes({"method.reward_weights": "as_given"})
    assert as_given.method.mix_weights(config.reward_weights) == {"oracle": 3.0, "towers": 1.0}
    rewards[0]["weight"] = -1.0
    with pytest.raises(SettingsError, match=r"method\.reward_weights=sum_to_one: .* the sum 0"):
        load_config("mixgrpo", {"rewards": rewards})
    assert load_config("g2rpo", {"rewards": rewards}).reward_weights == {
        "oracle": -1.0,
        "towers": 1,
    }


def test_the_default_form_of_the_log_probability_needs_no_change_with_another_kernel():
    config = load_config("flow_grpo_fast", {"method.sde_type": "flow_sde", "method.eta": 0.7})
    assert config.method.cps_log_prob == "squared_error"  # has no effect


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, {1: 0.001, 400: 0.4, 500: 0.5, 900: 0.5}),  # GenEval and PickScore
        (
            {"decay_rate": 0.0075, "decay_start": 75, "max_decay": 0.999},  # OCR
            {2: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 300: 0.999},
        ),
    ],
)
def test_the_decay_of_the_old_policy_counts_updates(options, shares):
    method = METHODS.get("diffusionnft")(**options)
    assert {n: method.decay(n) for n in shares} == pytest.approx(shares)

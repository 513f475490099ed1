"""The bundled recipes: what they state, their cost, and two steps of each on a tiny model."""

import re

import pytest
import torch
import twins

from flowgrain import METHODS, Trainer, load_config
from flowgrain.config.load import read_source, recipe_facts, recipe_names
from flowgrain.methods import price
from flowgrain.methods.calibration import calibration_cost
from flowgrain.rewards import differentiable

NAMES = recipe_names()
LARGE = [name for name in NAMES if "/" in name]
PROMPTS = ["a red cat", "two blue dogs", "a green bird"]
COVERED = {(name.split("/")[0], load_config(name).method.name) for name in LARGE}
OTHERS = [(model, m) for model in ("flux", "sd3") for m in METHODS if (model, m) not in COVERED]

WITHOUT_RECIPE = {
    "draft": "published for Stable Diffusion 1, which is no flow model",
    "refl": "published for Stable Diffusion 1, which is no flow model",
    "ddpo": "published for Stable Diffusion 1.5, which is no flow model",
    "e_grpo": "the published scripts differ, and state no complete run",
    "flow_dppo": "the published run draws 3 of the first 5 steps for every rollout",
    "stepwise_flow_grpo": "no code was published, and the paper's settings were not read",
    "sft": "the published run has a KL weight of another method, and its launch script is broken",
}


def leaves(values, prefix=""):
    """The values of nested mappings by full path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def at(config, path):
    values = config.to_dict()
    for part in path.split("."):
        values = values[part]
    return values


def test_the_published_runs_have_recipes():
    assert NAMES[0] == "demo"
    trained = {load_config(name).method.name for name in LARGE}
    assert trained == set(METHODS) - set(WITHOUT_RECIPE)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_facts(name):
    facts, config = recipe_facts(name), load_config(name)
    keys = ("name", "title", "paper", "source", "task", "hardware", "cost", "published")
    assert set(facts) == set(keys)
    for key, value in facts.items():
        assert isinstance(value, str), key
        assert value.strip() == value != "", key
    assert facts["paper"] == type(config.method).paper
    assert facts["title"].startswith(type(config.method).title)
    assert config.name == name.replace("/", "-")
    if "/" in name:
        assert config.model.name == name.split("/")[0]
        assert "--preset one-gpu" in facts["hardware"]
        assert " -> " in facts["published"] or facts["published"].startswith("No result")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_only_what_differs_from_the_defaults(name):
    _, values = read_source(name)
    values.pop("recipe")
    method = values["method"].pop("name")
    model = values.get("model", {}).pop("name", "shapes")
    defaults = load_config(method, {"model.name": model})
    for path, value in leaves(values):
        assert value != at(defaults, path), path


COST = re.compile(
    r"^([\d,.]+) sampling forward passes per prompt, ([\d,.]+) with gradient, ([\d,]+) decodes"
    r"(?P<mean> \(mean over the run\))?; ([\d,]+) prompts per step, ([\d,]+) steps"
    r"(?:; calibration: (?P<calibration>[\d,]+) forward passes)?"
    r"(?P<cfg>\. True CFG doubles the forward passes)?$"
)


def mean_cost(config):
    """Forward passes, those with gradient, and decodes per prompt: the mean over the run."""
    method, num_steps = config.method, config.sampling.num_steps
    steps = range(1, config.training.max_steps + 1) if method.plan_varies else (1,)
    per_step = [price(method, num_steps, step=k, seed=config.runtime.seed) for k in steps]
    kinds = ("forward_passes", "train_forward_passes", "decodes")
    return [sum(getattr(cost, kind) for cost in per_step) / len(per_step) for kind in kinds]


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_a_recipe_is_that_of_its_plan(name):
    config = load_config(name)
    stated = COST.match(recipe_facts(name)["cost"])
    assert stated, recipe_facts(name)["cost"]
    numbers = [float(stated[group].replace(",", "")) for group in (1, 2, 3, 5, 6)]
    training = config.training
    expected = [round(value, 1) for value in mean_cost(config)]
    assert numbers == [*expected, training.prompts_per_step, training.max_steps]
    assert bool(stated["mean"]) == config.method.plan_varies
    calibration = calibration_cost(config.method, config.sampling.num_steps).forward_passes
    assert int((stated["calibration"] or "0").replace(",", "")) == calibration
    true_cfg = config.sampling.guidance_scale != 1 and config.model.name != "flux"
    assert bool(stated["cfg"]) == true_cfg


@differentiable
def brightness(images, prompts):
    return images.mean((1, 2, 3)) + images[:, 0].std((1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.sd3(root / "sd3", with_t5=False, clip_tokens=8)
    twins.flux(root / "flux")
    return root


def two_steps(folders, folder, source, changes, preset=None):
    """Two steps on the tiny twin of the model, with small images and groups of four."""
    config = load_config(source, changes)
    model, method = config.model.name, config.method
    small = {
        "model.path": str(folders / model),
        "model.height": 8,
        "model.width": 8,
        "model.max_prompt_tokens": 16,
        "model.embedding_cache": str(folder / "cache"),
        "runtime.dtype": "float32",
        "runtime.device": "cpu",
        "training.max_steps": 2,
        "training.prompts_per_step": 1,
        "training.micro_batch_size": 16,
        "sampling.batch_size": 128,
        "evaluation.every": 0,
        "method.group_size": 4,
        "optimizer.learning_rate": 1e-3,
    }
    if method.name == "branchgrpo":
        small["method.split_steps"] = [0, 3]
    if method.name == "tempflow_grpo":
        small["method.seeds"] = 2
    if method.name == "mend":  # a random VAE has a small gradient. The first moves are accepted
        small["method.tau"] = 1e6
        small["method.tau_range"] = [1e-3, 1e6]
    if calibration_cost(method, config.sampling.num_steps).forward_passes:
        small |= {"method.calibration.rounds": 1, "method.calibration.samples": 2}
    config = load_config(source, {**changes, **small}, preset=preset)
    rewards = {"brightness": brightness}
    trainer = Trainer(config, folder, rewards=rewards, prompts=PROMPTS, eval_prompts=PROMPTS)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    metrics = [trainer.step(1), trainer.step(2)]
    assert all(line["grad_norm"] > 0 and line["updates/skipped"] == 0 for line in metrics)
    cost = price(config.method, config.sampling.num_steps, seed=config.runtime.seed)
    assert metrics[0]["forward_passes"] == cost.forward_passes
    assert metrics[0]["train_forward_passes"] == cost.train_forward_passes
    parameters = trainer.policy.parameters
    assert any(not torch.equal(p, before[name]) for name, p in parameters.items())
    assert trainer.policy.lora == (config.lora.rank > 0)
    return config


FAST = ("flux/g2rpo", "flux/mixgrpo", "sd3/flow_grpo", "sd3/densegrpo", "sd3/diffusionnft")


@pytest.mark.parametrize("preset", [None, pytest.param("one-gpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LARGE],
)
def test_two_steps_of_a_recipe(folders, tmp_path, name, preset):
    config = two_steps(folders, tmp_path, name, {}, preset)
    assert config.sampling.num_steps == load_config(name).sampling.num_steps
    assert config.sampling.prompts_per_chunk == (4 if preset else None)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), OTHERS)
def test_two_steps_of_every_other_method_on_both_models(folders, tmp_path, model, method):
    config = two_steps(folders, tmp_path, method, {"model.name": model})
    assert config.sampling.guidance_scale > 1

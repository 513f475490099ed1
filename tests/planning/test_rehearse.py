"""Rehearsals: what they count, and which errors of a first GPU run they find."""

import dataclasses
import json

import pytest
import twins

from flowgrain import SettingsError
from flowgrain.config import load_config
from flowgrain.config.load import recipe_names
from flowgrain.planning import search
from flowgrain.planning.forecast import forecast
from flowgrain.planning.gpus import COMPILED, EAGER, GPUS, gpu_named
from flowgrain.planning.plan import prompt_cost
from flowgrain.planning.rehearsal.ledger import Peak
from flowgrain.planning.rehearsal.stand_ins import PARAMETERS
from flowgrain.planning.rehearse import RehearsalError, Rehearser, prepared, rehearse
from flowgrain.planning.search import Proposal, proposals
from flowgrain.training.memory import memory
from flowgrain.training.sizes import model_size

H100 = GPUS["h100"]
SLOW = pytest.mark.slow
SMALL = {
    "sampling.num_steps": 3,
    "training.prompts_per_step": 2,
    "method.group_size": 4,
    "sampling.batch_size": 8,
    "evaluation.rewards": [],
    "training.micro_batch_size": 2,
}
OPTIONS = {"g2rpo": {"method.granularities": [1, 2]}}
"""Options that a method needs with these settings."""


@pytest.fixture(scope="module")
def process():
    with Rehearser() as found:
        yield found


@pytest.fixture(scope="module")
def usual(process):
    """Flow-GRPO with the small settings."""
    return process.rehearse(load_config("flow_grpo", SMALL), 1, H100)


@pytest.mark.parametrize(
    "method",
    ["g2rpo", *(pytest.param(m, marks=SLOW) for m in ("flow_grpo", "diffusionnft", "densegrpo"))],
)
def test_the_rows_are_those_of_the_plan(process, method):
    config = load_config(method, {**SMALL, **OPTIONS.get(method, {})})
    cost, prompts = prompt_cost(config), config.training.prompts_per_step
    counts = process.rehearse(config, 1, H100).measured.counts
    assert counts["gradient"] == prompts * cost.train_forward_passes
    without = prompts * (cost.forward_passes + cost.frozen_forward_passes)
    assert counts["no gradient"] == without
    assert counts["decoded"] == prompts * cost.decodes
    halved = process.rehearse(config, 2, H100).measured.counts
    assert {name: 2 * count for name, count in halved.items()} == counts


@pytest.mark.parametrize(
    ("method", "changes", "gpus"),
    [
        pytest.param(
            "flow_grpo", {"training.ema_decay": 0.9, "method.kl_weight": 0.1}, 1, marks=SLOW
        ),
        pytest.param("flow_grpo", {"lora.rank": 4, "method.kl_weight": 0.1}, 1, marks=SLOW),
        pytest.param("diffusionnft", {}, 1, marks=SLOW),
        pytest.param("g2rpo", {"runtime.rollout_weights": "replica"}, 4, marks=SLOW),
        pytest.param(
            *("g2rpo", {"runtime.rollout_weights": "sharded", "method.kl_weight": 0.1}, 4),
            marks=SLOW,
        ),
    ],
)
def test_what_a_run_holds(process, method, changes, gpus):
    """Kinds that stay for the whole run, against sums of parameters (`training.memory`)."""
    config = prepared(
        load_config(method, {**SMALL, **OPTIONS.get(method, {}), **changes}), gpus, H100
    )
    expected = memory(config, model_size(config.model), dtype_of(config), gpus).parts
    found = process.rehearse(config, gpus, H100).phases["optimizer"].kinds
    names = {"weights", "optimizer", "EMA", "reference", "old policy", "sampling copy", "VAE"}
    for name in names:
        formula = expected.get("AdamW" if name == "optimizer" else name, 0.0)
        # The allocator rounds every tensor up to 512 bytes, which is visible in a small model.
        assert found.get(name, 0.0) == pytest.approx(formula, rel=0.05, abs=2e5), name


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "least"), [(0.01, 8e6), (0.0002, 0)])
def test_kept_graphs_take_the_memory_of_their_setting(process, memory, least):
    """A graph of one row takes 1.6 MB, so that the smaller memory has room for none."""
    settings = {**SMALL, "method.updates_per_rollout": 1}
    usual, kept = (
        process.rehearse(load_config("flow_grpo", {**settings, **changes}), 1, H100)
        for changes in ({}, {"training.graph_memory": memory})
    )
    more = kept.phases["sample"].total - usual.phases["sample"].total
    assert least <= more <= 1.1e9 * memory
    assert least or more <= 1e4
    # One and two rows are measured to find the memory of a graph.
    assert kept.measured.counts["gradient"] == usual.measured.counts["gradient"] + 3


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("flow_grpo", {}, marks=SLOW),
        pytest.param(
            "g2rpo",
            {"sampling.explore.candidates": 8, "sampling.explore.num_steps": 2},
            marks=SLOW,
        ),
        pytest.param("flow_grpo", {"training.adaptive_groups.probe": 2}, marks=SLOW),
    ],
)
def test_rollouts_in_chunks(process, method, changes):
    """A run scores a chunk in another thread. In a rehearsal the rows are the same."""
    settings = {**SMALL, **changes}
    if method == "g2rpo":
        settings |= {"method.granularities": [1]}
    whole = process.rehearse(load_config(method, settings), 1, H100).measured
    chunks = load_config(method, {**settings, "sampling.prompts_per_chunk": 3})
    assert process.rehearse(chunks, 1, H100).measured.counts == whole.counts


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flux/flow_grpo", "sd3/flow_grpo"])
def test_the_preset_of_one_gpu(process, recipe):
    config = load_config(recipe, preset="one-gpu")
    assert config.sampling.prompts_per_chunk
    assert process.rehearse(config, 1, H100, depth="shallow").measured.counts["decoded"] > 0


@pytest.mark.slow
def test_bytes_over_links(process):
    """An update gathers the parameters for the replica. Gradients of a LoRA are summed."""
    changes = {**SMALL, "runtime.rollout_weights": "replica", "method.updates_per_rollout": 1}
    full = load_config("flow_grpo", changes)
    moved = process.rehearse(full, 2, H100).measured.moved
    parameters = 4 * model_size(full.model).transformer
    gathered = moved["optimizer: all_gather_into_tensor in a machine"]
    assert gathered == pytest.approx(parameters / 2, rel=0.01)
    lora = {**changes, "training.prompts_per_step": 16, "lora.rank": 4}
    found = process.rehearse(load_config("flow_grpo", lora), 16, H100).measured
    adapter = 4 * 4 * model_size(full.model).adapter
    assert found.moved == {"optimizer: allreduce between machines": 2 * adapter * 15 / 16}


@pytest.mark.slow
def test_ranks_of_a_context_group_divide_the_tokens(process, tmp_path):
    """Twice as many rows on each rank, with half of the tokens."""
    twins.flux(tmp_path / "flux")
    model = {"model.name": "flux", "model.path": str(tmp_path / "flux"), "model.height": 16}
    values = {**SMALL, **model, "model.width": 16, "model.max_prompt_tokens": 8}
    values |= {"rewards": [{"name": "clip", "model": "none"}], "training.prompts_per_step": 4}
    config = load_config("flow_grpo", values)
    grouped = config.with_changes({"runtime.context_parallel": 2})
    alone, group = (process.rehearse(c, 4, H100).measured for c in (config, grouped))
    for kind in ("no gradient", "gradient"):
        assert group.counts[kind] == 2 * alone.counts[kind]
    assert group.flops["sample"] == pytest.approx(alone.flops["sample"], rel=0.1)
    exchanged = "later micro-batches: all_to_all_single in a machine"
    assert group.moved[exchanged] > 0
    assert exchanged not in alone.moved
    assert all(name.count(": ") == 1 for name in group.moved)  # phase: collective
    odd = grouped.with_changes({"model.max_prompt_tokens": 7})
    with pytest.raises(SettingsError, match=r"must divide model\.max_prompt_tokens=7"):
        process.rehearse(odd, 4, H100)


@pytest.mark.slow
def test_rewards_of_evaluations_are_in_memory(process):
    held = [{"name": "pickscore", "device": "cuda"}]
    config = load_config("flow_grpo", {**SMALL, "evaluation.rewards": held})
    phases = process.rehearse(config, 1, H100).phases
    size = 4 * PARAMETERS["pickscore"]
    for phase in ("sample", "optimizer"):
        assert phases[phase].kinds["rewards"] == pytest.approx(size, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft", "refl"])
def test_methods_that_train_on_the_gradient_of_the_reward(process, method):
    changes = {name: value for name, value in SMALL.items() if name != "method.group_size"}
    config = load_config(method, changes)
    found = process.rehearse(config, 1, H100)
    assert found.measured.counts["gradient"] == 2 * prompt_cost(config).train_forward_passes
    assert found.phases["first micro-batch"].total > found.phases["sample"].total


def dtype_of(config):
    import torch

    return getattr(torch, config.runtime.dtype)


@pytest.mark.slow
def test_less_memory_without_unsharded_gradients(process):
    changes = {**SMALL, "runtime.rollout_weights": "sharded"}
    update, often = (
        process.rehearse(
            load_config("flow_grpo", {**changes, "runtime.gradient_reduction": reduction}), 4, H100
        )
        for reduction in ("update", "micro_batch")
    )
    gradients = [
        found.phases["later micro-batches"].kinds["gradients"] for found in (update, often)
    ]
    assert gradients[1] < 0.5 * gradients[0]
    moved = [sum(found.measured.moved.values()) for found in (update, often)]
    assert moved[1] > moved[0]


@pytest.mark.slow
def test_activations_of_the_update_grow_with_its_rows(process):
    def update(**changes):
        larger = {"sampling.num_steps": 4, "training.prompts_per_step": 4}
        config = load_config("flow_grpo", {**SMALL, **larger, **changes})
        return process.rehearse(config, 1, H100).phases["first micro-batch"].kinds["activations"]

    six, twelve, all_rows = (update(**{"training.micro_batch_size": n}) for n in (6, 12, 24))
    assert all_rows - twelve == pytest.approx(2 * (twelve - six), rel=0.02)


@pytest.mark.slow
def test_values_are_finite(process, tmp_path):
    """A check of a method for NaN and infinity does not raise an error."""
    plugin = tmp_path / "finite.py"
    mistake = (
        "assert not edges.x_next.isnan().any(); "
        "assert not (edges.x_next.isnan() | edges.x_next.isinf()).flatten(1).any(1).sum().item(); "
        "assert not edges.advantage.isnan().cpu().any(); assert edges.x_next.isfinite().all()"
    )
    plugin.write_text(PLUGIN.format(class_name="Finite", name="finite", mistake=mistake))
    process.rehearse(load_config("finite", SMALL, plugins=[plugin]), 1, H100)


@pytest.mark.slow
def test_masks_select_every_row(process, usual, tmp_path):
    plugin = tmp_path / "masks.py"
    mistake = (
        "known = edges.advantage > 0; inner(edges).loss[known].sum(); edges.advantage.nonzero(); "
        "edges.advantage.masked_select(known)"
    )
    text = PLUGIN.format(class_name="Masks", name="masks", mistake=mistake)
    plugin.write_text(text)
    masks = process.rehearse(load_config("masks", SMALL, plugins=[plugin]), 1, H100).measured
    assert masks.counts == usual.measured.counts
    waits = [sum(found.syncs.values()) for found in (usual.measured, masks)]
    assert waits[0] < waits[1]  # the host waits for a shape


PLUGIN = """
import torch
from flowgrain.methods import register
from flowgrain.methods.flow_grpo import FlowGRPO


@register
class {class_name}(FlowGRPO):
    '''A method with a mistake that only a GPU shows.'''

    name = "{name}"

    def objective(self, sigmas):
        inner = super().objective(sigmas)

        def loss(edges):
            {mistake}
            return inner(edges)

        return loss
"""


@pytest.mark.parametrize(
    ("name", "mistake", "message"),
    [
        ("on_cpu", "edges.advantage + torch.ones(3).mean(0, keepdim=True)", "at least two devices"),
        pytest.param(
            *("wrong_shape", "edges.x_next @ edges.x_next.flatten(1)", "RuntimeError"), marks=SLOW
        ),
    ],
)
def test_mistakes_of_a_method(process, tmp_path, name, mistake, message):
    plugin = tmp_path / f"{name}.py"
    title = name.title().replace("_", "")
    plugin.write_text(PLUGIN.format(class_name=title, name=name, mistake=mistake))
    config = load_config(name, SMALL, plugins=[plugin])
    with pytest.raises(RehearsalError, match=message) as raised:
        process.rehearse(config, 1, H100)
    assert name in str(raised.value)
    assert "Traceback" in raised.value.details


@pytest.mark.slow
def test_waits_for_the_device_are_counted(process, usual, tmp_path):
    plugin = tmp_path / "asking.py"
    text = PLUGIN.format(class_name="Asking", name="asking", mistake="float(edges.advantage.sum())")
    plugin.write_text(text)
    config = load_config("asking", SMALL, plugins=[plugin])
    asking = process.rehearse(config, 1, H100).measured.syncs
    # Two updates with four micro-batches each. Only three of each run.
    assert sum(asking.values()) == sum(usual.measured.syncs.values()) + 8
    # Losses and ratios are read once, whatever the number of micro-batches.
    rows = {**SMALL, "training.micro_batch_size": 4}
    fewer = process.rehearse(load_config("flow_grpo", rows), 1, H100).measured.syncs
    assert fewer == usual.measured.syncs


def test_the_forecast_divides_flops_by_the_rate_of_the_gpu(usual):
    expected = forecast(usual, H100)
    flops = usual.measured.flops["sample"]
    assert expected.seconds["sampling"] == flops / (EAGER * 989e12)
    assert expected.total == sum(expected.seconds.values())
    compiled = dataclasses.replace(usual, compiled=True)
    assert forecast(compiled, H100).total == pytest.approx(expected.total * EAGER / COMPILED)
    assert expected.moved == {}


def test_settings_that_cannot_be_rehearsed(tmp_path):
    with pytest.raises(SettingsError, match=r"--gpu h10: there is no such GPU.*'h100'"):
        gpu_named("h10")
    explore = {"sampling.explore.candidates": 16, "sampling.explore.num_steps": 2}
    for section, changes in (("sampling", {}), ("sampling.explore", explore)):
        for option, value, exact in (
            ("tail_weights", "int8", "same"),
            ("tail_cache", "first_block:0.1", "none"),
        ):
            setting = f"{section}.{option}"
            settings = {**changes, "sampling.num_steps": 8, "method.granularities": [1]}
            approximate = load_config("g2rpo", {**SMALL, **settings, setting: value})
            with pytest.raises(SettingsError, match=rf"^{setting}={value}.*Use {setting}={exact}"):
                rehearse(approximate, 1, H100)
    with pytest.raises(SettingsError, match=r"^--gpus 12: .* Use at most 8, or a multiple of 8"):
        rehearse(load_config("flow_grpo", SMALL), 12, H100)
    unknown = load_config("sd3/flow_grpo", {"model.path": "somebody/else"})
    with pytest.raises(SettingsError, match="configuration of transformer is not known"):
        rehearse(unknown, 1, H100)
    empty = load_config("sd3/flow_grpo", {"model.path": str(tmp_path)})
    with pytest.raises(SettingsError, match=r"transformer/config\.json is missing"):
        rehearse(empty, 1, H100)
    (tmp_path / "transformer").mkdir()
    for text in ('{"_class_name": "SD3', "[]"):
        (tmp_path / "transformer" / "config.json").write_text(text)
        damaged = load_config("sd3/flow_grpo", {"model.path": str(tmp_path)})
        with pytest.raises(SettingsError, match=r"^model.path=.*config.json is damaged \(.*again"):
            rehearse(damaged, 1, H100)


@pytest.mark.parametrize(
    ("gpus", "degree", "fix"),
    [
        (3, 2, "2 or 4"),
        (7, 2, "6 or 8"),
        (4, 5, "5"),
        (7, 5, "5 or 40"),
        (16, 3, "6 or 24"),
        (4, 12, "24"),
    ],
)
def test_numbers_of_gpus_that_context_groups_divide(gpus, degree, fix):
    config = load_config("flux/g2rpo", {"runtime.context_parallel": degree})
    with pytest.raises(SettingsError, match=rf"^--gpus {gpus}: .* Use --gpus {fix}\.$"):
        prepared(config, gpus, H100)
    for number in map(int, fix.split(" or ")):
        prepared(config, number, H100)


@pytest.mark.parametrize(
    ("dtype", "layout"), [("float32", "sharded"), ("auto", "replica"), ("bfloat16", "replica")]
)
def test_a_replica_is_rehearsed_if_it_fits_in_its_dtype(dtype, layout):
    """FLUX.1-dev has 11.9e9 parameters, and 40% of 80 GB are 32 GB."""
    config = load_config("flux/g2rpo", {"runtime.dtype": dtype})
    assert prepared(config, 8, H100).runtime.rollout_weights == layout


@pytest.mark.slow
def test_the_search_finds_settings_that_fit_exactly():
    config = load_config("flow_grpo", SMALL)
    small = dataclasses.replace(H100, memory=45e6)
    (found,) = proposals(config, small, (1,))
    assert found.fits
    assert found.memory <= 0.9 * small.memory
    rows = [setting for setting in found.settings if "batch_size" in setting]
    assert len(rows) == 3
    images = config.training.prompts_per_step * prompt_cost(config).decodes
    assert found.images_per_second == pytest.approx(images / found.seconds)
    (nothing,) = proposals(config, dataclasses.replace(H100, memory=1e6), (1,))
    assert not nothing.fits


def test_the_search_leaves_out_settings_that_fail(monkeypatch):
    config, said = load_config("flow_grpo", SMALL), []
    proposal = Proposal(1, True, [], 1e9, 1.0, 1.0)

    def largest(process, config, changes, gpus, gpu):
        if not changes["model.gradient_checkpointing"]:
            raise SettingsError("no such operator")
        return proposal

    monkeypatch.setattr(search, "_largest", largest)
    assert proposals(config, H100, (1,), said.append) == [proposal]
    grouped = load_config("flux/g2rpo", {"runtime.context_parallel": 4})
    assert proposals(grouped, H100, progress=said.append) == [proposal] * 3  # 4, 8 and 16 GPUs
    grouped = load_config("flux/g2rpo", {"runtime.context_parallel": 3})
    with pytest.raises(SettingsError, match=r"_parallel=3: divides none of 1, 2, .* --gpus"):
        proposals(grouped, H100)
    assert "model.gradient_checkpointing=false" in said[1]
    assert said[1].endswith(": no such operator")

    def refused(process, config, changes, gpus, gpu):
        tried.append(changes)
        raise SettingsError("no layout changes this")

    tried = []
    monkeypatch.setattr(search, "_largest", refused)
    with pytest.raises(SettingsError, match="no layout changes this"):
        proposals(config, H100, (1,))
    assert len(tried) == 2

    def failing(*_):
        raise RehearsalError("no such operator", "Traceback")

    monkeypatch.setattr(search, "_largest", failing)
    with pytest.raises(RehearsalError, match="no such operator"):
        proposals(config, H100, (1,))


def test_encoded_prompts_need_no_text_encoders(usual):
    """The bundled model has none."""
    assert usual.peak_if_encoded == usual.peak[1].total
    kinds = {"text encoders": 5.0, "weights": 2.0}
    peaks = {"encode": Peak({**kinds, "activations": 9.0}), "optimizer": Peak(kinds)}
    measured = dataclasses.replace(usual.measured, peaks=peaks)
    assert dataclasses.replace(usual, measured=measured).peak_if_encoded == 2.0


def test_numbers_as_json(usual):
    found = usual.to_dict()
    assert json.loads(json.dumps(found))["peak"]["total"] == found["peak"]["total"]
    assert found["peak"]["total"] == pytest.approx(sum(found["peak"]["kinds"].values()))
    assert found["peak"]["phase"] in found["phases"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe(process, recipe):
    """The first step of every recipe, at full width, on eight GPUs with one prompt each."""
    config = load_config(recipe, {"training.prompts_per_step": 8})
    found = process.rehearse(config, 8, H100, depth="shallow")
    # A repair decodes candidates of the images that it can repair, which depends on rewards.
    assert found.measured.counts["decoded"] >= len(config.tree().leaves)
    assert found.measured.counts["gradient"] > 0
    assert found.measured.checkpoint > 0

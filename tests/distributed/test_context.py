"""Context parallelism: the ranks of a group that divide the tokens are one process."""

import math

import pytest
import rank_context
import torch
import twins
from diffusers.models.attention_dispatch import attention_backend
from hypothesis import given
from hypothesis.strategies import integers
from rank_pool import PYTHONPATH, RankPool

from flowgrain import SettingsError, load_config
from flowgrain.models import Dtypes, load_backbone
from flowgrain.planning.doctor import examine
from flowgrain.training.context import SUPPORTED, check_context, check_ranks, nearest_rows

TWO = {"runtime.context_parallel": 2}
LORA = {"lora.rank": 2}
SHARDED = {"runtime.rollout_weights": "sharded"}


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)  # the server that forks does not take sys.path
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = RankPool(4)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The directory of the twin of a model."""
    root = tmp_path_factory.mktemp("twins")

    def folder(name):
        if not (root / name).exists():
            getattr(twins, name)(root / name)
        return root / name

    return folder


SLOW = pytest.mark.slow
CHECKPOINTING = {"model.gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("flux", {}, id="flux", marks=SLOW),
        pytest.param("flux2", LORA, id="flux2 lora", marks=SLOW),
        pytest.param("qwen_image", {}, id="qwen_image"),
        pytest.param("flux", CHECKPOINTING, id="flux checkpointing", marks=SLOW),
        pytest.param("flux2", CHECKPOINTING, id="flux2 checkpointing", marks=SLOW),
        pytest.param("qwen_image", {**LORA, **CHECKPOINTING}, id="qwen_image lora", marks=SLOW),
    ],
)
def test_velocities_and_gradients_are_those_of_one_process(
    tmp_path, pool, folder_of, name, changes
):
    """Of the parameters, summed over the ranks, and of the latents on every rank."""
    one = rank_context.velocity_and_gradients(tmp_path / "one", folder_of(name), changes)[0]
    arguments = (tmp_path / "two", folder_of(name), {**TWO, **changes})
    two = pool.run(2, rank_context.velocity_and_gradients, *arguments)
    for of_rank in two:
        for mine, expected in zip(of_rank[:3], one[:3], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        assert of_rank[3].keys() == one[3].keys()
        for key, gradient in one[3].items():
            atol = 1e-5 * max(float(gradient.abs().max()), 1.0)
            torch.testing.assert_close(of_rank[3][key], gradient, atol=atol, rtol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_gradients_in_bfloat16(tmp_path, pool, folder_of, name):
    """Under autocast. Rounding is 2^-8 of a value, and a part of the gradients nearly cancels."""
    changes = {"runtime.dtype": "bfloat16"}
    one = rank_context.velocity_and_gradients(tmp_path / "one", folder_of(name), changes)[0]
    arguments = (tmp_path / "two", folder_of(name), {**TWO, **changes})
    for of_rank in pool.run(2, rank_context.velocity_and_gradients, *arguments):
        for mine, expected in zip(of_rank[:3], one[:3], strict=True):
            assert (mine - expected).norm() < 0.02 * expected.norm()
        whole, expected = (torch.cat([g.flatten() for g in r[3].values()]) for r in (of_rank, one))
        assert (whole - expected).norm() < 0.02 * expected.norm()


CASES = {
    "flux full": ("flux", {}, "g2rpo"),
    "flux sharded": ("flux", SHARDED, "g2rpo"),
    "flux lora": ("flux", {**LORA, "training.ema_decay": 0.9}, "g2rpo"),
    "qwen_image lora": ("qwen_image", LORA, "flow_grpo"),
    "flux kl": ("flux", {"method.kl_weight": 0.1}, "flow_grpo"),
    "flux2 old policy": ("flux2", LORA, "diffusionnft"),
    "flux reward gradient": ("flux", {"method.last_steps": 2}, "draft"),
    "flux lora, reused graphs": (
        "flux",
        {
            **LORA,
            "runtime.rollout_weights": "replica",
            "method.updates_per_rollout": 1,
            "training.graph_memory": "all",
        },
        "flow_grpo",
    ),
    "flux lora, explored": (
        "flux",
        {**LORA, "sampling.explore": {"candidates": 5, "num_steps": 2}},
        "flow_grpo",
    ),
    "flux lora, adaptive": (
        "flux",
        {
            **LORA,
            "method.group_size": 3,
            "training.adaptive_groups": {"probe": 2, "min_spread": 0.0012},
        },
        "flow_grpo",
    ),
    "flux reduced often": (
        "flux",
        {
            **SHARDED,
            "runtime.gradient_reduction": "micro_batch",
            "training.micro_batch_size": 2,
            "sampling.decode_batch_size": 1,
        },
        "flow_grpo",
    ),
}


FEW = ("flux full",)


@pytest.mark.parametrize(
    ("size", "names"),
    [
        pytest.param(2, FEW, id="2 of some cases"),
        pytest.param(2, tuple(CASES), marks=SLOW, id="2"),
        pytest.param(4, tuple(CASES), marks=SLOW, id="4"),
    ],
)
def test_a_run_is_that_of_one_process(tmp_path, pool, folder_of, size, names):
    """Images, advantages, metrics and parameters, with one or two groups."""

    def cases(changes):
        for name in names:
            twin, of_case, method = CASES[name]
            yield name, (folder_of(twin), {**of_case, **changes}, method)

    single = rank_context.every_case(tmp_path / "one", dict(cases({})))
    arguments = (tmp_path / "several", dict(cases(TWO)))
    several = pool.run(size, rank_context.every_case, *arguments, timeout=200)
    for name in names:
        one, many = single[name], several[name]
        assert many["equal"], name
        assert many["sharded"] == ("lora" not in name and "old policy" not in name), name
        if "gradient" not in name:  # the first rank of a group scores its images
            scored = many["scored"]
            assert all(scored[::2]), name
            assert not any(scored[1::2]), name
        for step in range(2):
            for kind in ("images", "advantage"):
                mine, expected = many[kind][step], one[kind][step]
                torch.testing.assert_close(
                    mine, expected.reshape(mine.shape), atol=1e-4, rtol=1e-4, msg=f"{name} {kind}"
                )
            assert many["metrics"][step] == pytest.approx(
                one["metrics"][step], rel=1e-3, abs=1e-5
            ), name
        torch.testing.assert_close(many["evaluation"], one["evaluation"], atol=1e-5, rtol=0)
        for key, value in one["weights"].items():
            torch.testing.assert_close(
                many["weights"][key],
                value,
                atol=1e-5,
                rtol=0,
                msg=lambda m, p=(name, key): f"{p} {m}",
            )


@pytest.mark.slow
def test_resume_with_another_number_of_ranks_per_group(tmp_path, pool, folder_of):
    """Two ranks of one group, then one process. The curve is that of one process."""
    flux, first = folder_of("flux"), {"training.max_steps": 1, "evaluation.every": 0}
    rest = {**first, "training.max_steps": 2}
    expected = rank_context.train(tmp_path / "one", flux, rest)
    pool.run(2, rank_context.train, tmp_path / "several", flux, {**first, **TWO})
    found = rank_context.train(tmp_path / "several", flux, rest)
    assert found["steps"] == expected["steps"]
    assert found["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, atol=1e-5, rtol=0, msg=key)


def test_groups_of_ranks(pool):
    found = pool.run(4, rank_context.groups, 2)
    firsts = [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]
    assert [rank["data"] for rank in found] == firsts
    assert [rank["assigned"] for rank in found] == [[0, 2, 4]] * 2 + [[1, 3, 5]] * 2
    assert all(rank["values"] == [0, 2] for rank in found)
    assert [rank["main"] for rank in found] == [True, False, False, False]


@pytest.mark.parametrize(
    ("processes", "degree", "fix"),
    [
        (1, 2, "but there is 1. Start it with torchrun --nproc-per-node 2, or use "),
        (6, 4, "but there are 6. Use 1 or 2 or 3 or 6."),
    ],
)
def test_a_degree_that_does_not_divide_the_processes(monkeypatch, processes, degree, fix):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SettingsError) as error:
        check_ranks(degree)
    message = str(error.value)
    assert message.startswith(f"runtime.context_parallel={degree}: needs a multiple of {degree} p")
    assert fix in message
    check_ranks(1)
    check_ranks(processes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {}, "SD3Transformer2DModel. Use runtime.context_parallel=1, or model.name=flux or"),
        ("zimage", {}, "no plan that divides the tokens of ZImageTransformer2DModel"),
        ("flux", {"runtime.context_parallel": 4}, "the 2 attention heads of FluxTransformer2D"),
        ("flux", {"runtime.context_parallel": 4}, "Use 1 or 2."),
        ("flux", {"model.height": 36, "model.width": 36}, "the 81 image tokens of model.height=36"),
        ("flux", {"model.height": 36, "model.width": 36}, "Use model.height=32 or 40."),
        ("flux2", {"model.max_prompt_tokens": 41}, "max_prompt_tokens=41. Use 40 or 42."),
    ],
)
def test_a_model_that_cannot_divide_its_tokens(folder_of, name, changes, message):
    config = rank_context.config_of(folder_of(name), {**TWO, **changes})
    backbone = load_backbone(config.model, Dtypes())
    with pytest.raises(SettingsError) as error:
        check_context(config, backbone)
    assert str(error.value).startswith("runtime.context_parallel=")
    assert message in str(error.value)
    check_context(config.with_changes({"runtime.context_parallel": 1}), backbone)


@given(integers(1, 300), integers(1, 300), integers(2, 64))
def test_the_nearest_numbers_of_rows(rows, columns, degree):
    found = nearest_rows(rows, columns, degree)
    assert found == sorted(set(found))
    assert all(n >= 1 and n * columns % degree == 0 for n in found)
    assert all(n in found for n in range(found[0], found[-1] + 1) if n * columns % degree == 0)
    assert found[0] <= rows <= found[-1] or len(found) == 1


def test_an_attention_backend_that_cannot_divide_the_tokens(folder_of):
    config = rank_context.config_of(folder_of("flux"), TWO)
    config = config.with_changes({"model.attention_backend": "_native_math"})
    with attention_backend("native"):  # it restores the backend of this process
        backbone = load_backbone(config.model, Dtypes())
        with pytest.raises(SettingsError, match=r"_native_math cannot divide .* native, "):
            check_context(config, backbone)


@pytest.mark.parametrize("name", ["sd3", "zimage", *SUPPORTED])
def test_the_supported_models_have_a_plan_in_diffusers(folder_of, name):
    config = rank_context.config_of(folder_of(name), TWO)
    backbone = load_backbone(config.model, Dtypes())
    assert (backbone.transformer._cp_plan is not None) == (name in SUPPORTED)
    if name in SUPPORTED:
        check_context(config, backbone)
        assert math.prod(backbone.token_grid) % 2 == 0


def test_the_bundled_model_is_refused(tiny):
    config = tiny.with_changes(TWO)
    with pytest.raises(SettingsError, match="no plan that divides the tokens"):
        check_context(config, load_backbone(config.model, Dtypes()))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_doctor_checks_the_model_in_one_process(tmp_path, folder_of, name):
    changes = {**TWO, "rewards": ["oracle"], "data.prompts": str(tmp_path / "prompts.txt")}
    (tmp_path / "prompts.txt").write_text("\n".join(twins.PROMPTS))
    changes["data.eval_prompts"] = changes["data.prompts"]
    config = rank_context.config_of(folder_of(name), changes)
    findings = {finding.name: finding for finding in examine(config, tmp_path / "run")}
    assert findings["context parallelism"].ok == (name == "flux"), findings


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("g2rpo", {"runtime.compile": "inductor"}, "combined with runtime.compile=inductor"),
        ("g2rpo", {"sampling.tail_cache": "taylorseer:3"}, "sampling.tail_cache=taylorseer:3"),
        ("g2rpo", {"sampling.tail_weights": "int8"}, "combined with sampling.tail_weights=int8"),
        (
            "g2rpo",
            {"sampling.explore": {"candidates": 40, "tail_cache": "first_block:0.1"}},
            "combined with sampling.explore.tail_cache=first_block:0.1",
        ),
        (
            "g2rpo",
            {"sampling.explore": {"candidates": 40, "tail_weights": "int8"}},
            "combined with sampling.explore.tail_weights=int8",
        ),
        ("mend", {}, "method 'mend' scores candidates"),
    ],
)
def test_settings_that_exclude_context_parallelism(method, changes, message):
    load_config(method, changes)
    with pytest.raises(SettingsError) as error:
        load_config(method, {**changes, **TWO})
    assert "runtime.context_parallel=2: " in str(error.value)
    assert message in str(error.value)

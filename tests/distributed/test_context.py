"""Context parallelism: the ranks of a group that divide the tokens are one process."""

import pytest
import rank_context
import torch
import twins
from rank_pool import PYTHONPATH, RankPool

TWO = {"runtime.context_parallel": 2}
LORA = {"lora.rank": 2}
SHARDED = {"runtime.rollout_weights": "sharded"}
SUPPORTED = ["flux", "flux2", "qwen_image"]


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


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("changes", [{}, LORA, {"model.gradient_checkpointing": True}])
def test_velocities_and_gradients_are_those_of_one_process(
    tmp_path, pool, folder_of, name, changes
):
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


CASES = {
    "flux full": ("flux", {}, "g2rpo"),
    "flux sharded": ("flux", SHARDED, "g2rpo"),
    "flux lora": ("flux", {**LORA, "training.ema_decay": 0.9}, "g2rpo"),
    "qwen_image lora": ("qwen_image", LORA, "flow_grpo"),
    "flux kl": ("flux", {"method.kl_weight": 0.1}, "flow_grpo"),
    "flux2 old policy": ("flux2", LORA, "diffusionnft"),
    "flux reward gradient": ("flux", {"method.last_steps": 2}, "draft"),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory, folder_of):
    """The results of one process by case."""
    return rank_context.every_case(tmp_path_factory.mktemp("one"), with_folders(folder_of))


def with_folders(folder_of, changes=()):
    return {
        name: (folder_of(twin), {**of_case, **dict(changes)}, method)
        for name, (twin, of_case, method) in CASES.items()
    }


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_is_that_of_one_process(tmp_path, pool, single, folder_of, size):
    """Images, advantages, metrics and parameters within 1e-5, with one or two groups."""
    cases = with_folders(folder_of, TWO)
    several = pool.run(size, rank_context.every_case, tmp_path, cases)
    for name in cases:
        one, many = single[name], several[name]
        assert many["equal"], name
        assert many["sharded"] == ("lora" not in name and "old policy" not in name), name
        # The first rank of a group scores its images.
        of_groups = many["scored"][::2]
        assert many["scored"] == [n for scored in of_groups for n in (scored, 0)], name
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

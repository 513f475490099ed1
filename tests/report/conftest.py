"""A finished run, a finished comparison and a finished evaluation."""

import pytest

from flowgrain import Trainer, load_config
from flowgrain.evaluation import make_request, run_evaluation
from flowgrain.studies.comparison import Comparison
from flowgrain.studies.run import run_comparison


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The directory of a G2RPO run with three evaluations."""
    folder = tmp_path_factory.mktemp("report") / "run"
    values = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "method.granularities": [1, 2],
        "training.prompts_per_step": 2,
        "training.max_steps": 2,
        "evaluation.num_prompts": 6,
        "evaluation.every": 1,
        "evaluation.num_steps": 4,
        "rewards": ["oracle", "towers"],
    }
    Trainer(load_config("g2rpo", values), folder).train()
    return folder


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A comparison of two methods with two seeds, and its directory."""
    folder = tmp_path_factory.mktemp("report") / "comparison"
    common = {
        "sampling": {"num_steps": 4},
        "method": {"group_size": 3},
        "training": {"prompts_per_step": 2},
        "evaluation": {"num_prompts": 4, "num_steps": 2},
    }
    comparison = Comparison.model_validate(
        {
            "name": "small",
            "methods": {
                "g2rpo": {"method": {"granularities": [1]}},
                "mixgrpo": {"method": {"window_size": 1}},
            },
            "rewards": {"oracle": ["oracle"]},
            "seeds": [1, 2],
            "budget": 150,
            "common": common,
            "measurement": {"num_steps": [2, 3], "num_prompts": 4},
            "curve_points": 1,
        }
    )
    run_comparison(comparison, folder)
    return comparison, folder


@pytest.fixture(scope="session")
def evaluation(run, tmp_path_factory):
    """An evaluation of the base model and the run, and its directory."""
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    overrides = {"evaluation.num_prompts": 40}
    request = make_request(
        ["base", str(run)], overrides, steps=[2, 3], seeds=[0, 1], keep_images=True
    )
    run_evaluation(request, folder)
    return request, folder

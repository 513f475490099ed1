"""Two short runs, full and LoRA, and a finished evaluation."""

import pytest

from flowgrain import Trainer, load_config
from flowgrain.evaluation import make_request, run_evaluation

SMALL = {"evaluation.num_prompts": 70, "evaluation.rewards": ["towers"]}  # two chunks: 64 and 6


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with the runs "full" and "lora" of two steps, with EMA and exports."""
    root = tmp_path_factory.mktemp("runs")
    values = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "training.max_steps": 2,
        "training.ema_decay": 0.5,
        "optimizer.learning_rate": 1e-3,
    }
    for name, more in (("full", {}), ("lora", {"lora.rank": 2})):
        Trainer(load_config("g2rpo", {**values, **more}), root / name).train()
    return root


@pytest.fixture(scope="session")
def finished(trained, tmp_path_factory):
    """The base model and a run at two numbers of steps, from two seeds, with images."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    words = ["base", str(trained / "full")]
    request = make_request(words, SMALL, steps=[2, 3], seeds=[0, 1], keep_images=True)
    progress = run_evaluation(request, folder)
    assert (progress.finished, progress.total) == (16, 16)
    return request, folder

"""The commands `plan`, `fidelity` and `doctor`."""

import json
import subprocess
import sys

import pytest
from command_line import SMALL, flowgrain, refused, succeeded

from flowgrain.config import load_config
from flowgrain.planning.plan import RunPlan


def test_plan_in_a_process():
    words = ("plan", "g2rpo", "method.granularities=[1,2,3]", "--json")
    command = [sys.executable, "-m", "flowgrain", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = json.loads(result.stdout)
    assert numbers["forward_passes"] == 1708
    assert numbers["published_forward_passes"] == 2188


def test_plan_as_a_table():
    output = succeeded("plan", "flow_grpo", "sampling.num_steps=4")
    assert "0~1~2~3-4#" in output
    assert "sampling forward passes" in output
    assert "24 prompts per step, 100 steps: 230,400 sampling forward passes in total" in output


def test_plan_of_a_recipe():
    numbers = json.loads(succeeded("plan", "flux/g2rpo", "--json"))
    assert numbers == RunPlan(load_config("flux/g2rpo")).to_dict()
    lora = json.loads(succeeded("plan", "flux/g2rpo", "--json", "--preset", "one-gpu"))
    assert lora["forward_passes"] == numbers["forward_passes"]


@pytest.mark.slow
def test_plan_for_several_gpus():
    words = ("plan", "g2rpo", *SMALL, "--gpus", "2", "--gpu", "h200")
    numbers = json.loads(succeeded(*words, "--json"))
    assert {"seconds", "moved", "total"} == set(numbers["forecast"])
    assert numbers["forecast"]["total"] == sum(numbers["forecast"]["seconds"].values())
    assert numbers["rehearsal"]["peak"]["total"] > 0
    assert "--gpu b300" in refused("plan", "demo", "--gpus", "16", "--gpu", "b300")
    assert "--gpu h200: has no effect without --gpus" in refused("plan", "demo", "--gpu", "h200")


@pytest.mark.slow
def test_rehearse():
    output = succeeded("rehearse", "g2rpo", *SMALL, "--gpus", "2")
    assert "MB on each of 2 x h100" in output
    assert "weights" in output
    assert "Most memory:" in output


def test_what_cannot_be_rehearsed():
    assert "--gpu b300" in refused("rehearse", "demo", "--gpu", "b300")
    assert "--full-depth: has no effect" in refused("rehearse", "demo", "--search", "--full-depth")


def test_rehearse_search(monkeypatch):
    """Progress goes to stderr. --gpus selects a number of GPUs."""
    from flowgrain.planning import search

    asked = []

    def proposals(config, gpu, numbers, progress):
        asked.append(numbers)
        numbers = numbers or search.NUMBERS
        progress("8 GPUs: a layout")
        return [search.Proposal(n, True, ["sampling.batch_size=4"], 1e9, 2.0, 3.0) for n in numbers]

    monkeypatch.setattr(search, "proposals", proposals)
    found = flowgrain("rehearse", "g2rpo", *SMALL, "--search", "--json")
    assert [proposal["gpus"] for proposal in json.loads(found.stdout)] == [1, 2, 4, 8, 16]
    assert "a layout" in found.stderr
    assert "sampling.batch_size=4" in succeeded("rehearse", "g2rpo", "--search", "--gpus", "4")
    assert asked == [None, (4,)]


@pytest.mark.slow
def test_rehearse_as_json():
    numbers = json.loads(succeeded("rehearse", "g2rpo", *SMALL, "--gpus", "1", "--json"))
    assert numbers["fits"]
    assert numbers["peak"]["phase"] in numbers["phases"]


@pytest.mark.slow
def test_rehearse_a_step_that_fails(directory):
    (directory / "wrong.py").write_text(
        "import torch\n"
        "from flowgrain.methods import register\n"
        "from flowgrain.methods.flow_grpo import FlowGRPO\n\n\n"
        "@register\n"
        "class Wrong(FlowGRPO):\n"
        "    name = 'wrong'\n\n"
        "    def objective(self, sigmas):\n"
        "        return lambda edges: edges.advantage + torch.ones(1)\n"
    )
    result = flowgrain("rehearse", "wrong", "--plugin", "wrong.py", *SMALL, "--gpus", "1")
    assert result.status == 1
    assert "The training step fails: FakeTensorDeviceMismatchError" in result.stderr
    assert "wrong.py:11" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    words = ("rehearse", "wrong", "--plugin", "wrong.py", *SMALL, "--gpus", "1", "--debug")
    assert "Traceback" in flowgrain(*words).stderr


def test_fidelity():
    words = ("fidelity", "mixgrpo", *SMALL, "method.window_size=2", "sampling.num_steps=6")
    cheap = ("--cheap", "method.tail_order=2", "--cheap", "method.tail_ratio=0.4")
    numbers = json.loads(succeeded(*words, *cheap, "--steps", "1", "--json"))
    keys = {"spearman", "spearman_10", "spearman_90", "flipped", "seconds", "passes"}
    assert set(numbers) == keys
    assert numbers["passes"] < 1
    assert "Spearman correlation" in succeeded(*words, *cheap, "--steps", "1")
    assert "--cheap: required" in refused(*words)
    assert "is not an override" in refused(*words, "--cheap", "tail_ratio")
    changed = refused(*words, "--cheap", "method.window_size=3")
    assert "do not train the same edges" in changed


def test_doctor(directory):
    output = succeeded("doctor", "g2rpo", *SMALL)
    assert "memory" in output
    assert "forward pass" in output
    assert "failed" not in output
    assert list(directory.iterdir()) == []


def test_doctor_with_a_problem(directory):
    (directory / "a.txt").write_text("two red circles\none blue square\n")
    same = ("data.prompts=a.txt", "data.eval_prompts=a.txt")
    result = flowgrain("doctor", "g2rpo", *SMALL, *same)
    assert result.status == 1
    assert "2 evaluation prompts are also training prompts" in " ".join(result.stdout.split())

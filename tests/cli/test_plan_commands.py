"""The commands `plan`, `fidelity` and `doctor`."""

import json
import subprocess
import sys

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


def test_forecast():
    words = ("plan", "flux/g2rpo", "--gpus", "16", "--gpu", "h200")
    forecast = json.loads(succeeded(*words, "--json"))["forecast"]
    assert {"seconds", "moved", "held", "flops_of_pass", "total"} == set(forecast)
    assert forecast["total"] == sum(forecast["seconds"].values())
    output = succeeded(*words)
    assert "seconds per step on 16 x h200" in output
    assert "--gpu b300" in refused("plan", "flux/g2rpo", "--gpus", "16", "--gpu", "b300")
    assert "Use flux or sd3" in refused("plan", "demo", "--gpus", "16")


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

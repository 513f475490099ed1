"""The command `train`: sources, overrides, resuming, and what it writes and prints."""

import json
import re
import shutil
import socket

import pytest
import twins
from command_line import SMALL, flowgrain, refused, succeeded

from flowgrain.config import load_config
from flowgrain.records.run_lock import RunLock

REWARD = """
def brightness(images, prompts):
    return images.mean((1, 2, 3)) + images[:, 0].std((1, 2))
"""


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_writes(run):
    assert {path.name for path in run.iterdir()} >= {
        "run.yaml",
        "metrics.jsonl",
        "checkpoints",
        "evaluations",
        "groups",
        "export",
        "report.html",
    }
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert {"reward/oracle", "loss", "ratio/mean", "grad_norm"} <= set(metrics[1])


def test_the_default_directory_and_the_lines_that_are_printed(directory):
    output = succeeded("train", *SMALL)
    assert output.startswith("g2rpo on shapes: steps 1 to 2, into runs/demo\n")
    assert re.search(r"done in \d+ s\.\nopen runs/demo/report.html\n$", output)
    assert (directory / "runs/demo/run.yaml").exists()


def test_a_directory_with_a_run_is_refused_before_anything_is_printed(directory):
    succeeded("train", *SMALL, "--out", "run")
    result = flowgrain("train", *SMALL, "--out", "run")
    assert result.status == 2
    assert result.stdout == ""


def test_a_report_that_cannot_be_written(directory):
    (directory / "run" / "report.html").mkdir(parents=True)  # a directory is not a file
    result = flowgrain("train", *SMALL, "--out", "run")
    assert result.status == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "training is finished, but the report could not be written: " in result.stderr
    assert result.stderr.endswith("Run flowgrain report run.\n")
    assert len(metrics_of(directory / "run")) == 2


def test_a_method_with_options(directory):
    options = ("method.granularities=[1,2]", "runtime.seed=1", "--out", "runs/two")
    succeeded("train", "g2rpo", *SMALL, *options)
    config = load_config("runs/two")
    assert config.method.granularities == (1, 2)
    assert config.runtime.seed == 1


def test_a_checkpoint_per_step(directory):
    succeeded("train", "flow_grpo", *SMALL, "training.checkpoint_every=1", "--out", "three")
    checkpoints = directory / "three" / "checkpoints"
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-000001", "step-000002"}


def test_a_yaml_file_and_the_settings_of_a_run(directory):
    (directory / "my.yaml").write_text("method: {name: g2rpo}\nsampling: {num_steps: 4}\n")
    rest = [word for word in SMALL if not word.startswith("sampling")]
    succeeded("train", "my.yaml", *rest, "optimizer.learning_rate=1e-4", "--out", "one")
    assert load_config("one").optimizer.learning_rate == 1e-4
    assert load_config("one").name == "my"
    succeeded("train", "one", "training.max_steps=1", "--out", "again")
    assert len(metrics_of(directory / "again")) == 1
    first = {"reward/oracle", "loss", "grad_norm"}
    one, again = (metrics_of(directory / name)[0] for name in ("one", "again"))
    assert {key: one[key] for key in first} == {key: again[key] for key in first}


def test_rewards_on_the_command_line(directory):
    rewards = "rewards=[towers,{name: preference, weight: 0.5}]"
    succeeded("train", "g2rpo", *SMALL, rewards, "--out", "run")
    assert load_config("run").reward_weights == {"towers": 1.0, "preference": 0.5}


class TestResume:
    """--resume continues a run with its own settings."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("one_step") / "run"
        succeeded("train", "g2rpo", *SMALL, "training.max_steps=1", "--out", folder)
        return folder

    @pytest.fixture
    def short(self, trained, directory):
        return shutil.copytree(trained, directory / "runs/two")

    def test_more_steps(self, short, directory):
        output = succeeded("train", "--resume", "runs/two", "training.max_steps=2")
        assert "g2rpo on shapes: step 2, into runs/two" in output
        succeeded("train", "g2rpo", *SMALL, "--out", "whole")
        resumed, whole = metrics_of(short), metrics_of(directory / "whole")
        assert [line["step"] for line in resumed] == [1, 2]
        assert resumed[1]["loss"] == whole[1]["loss"]

    def test_nothing_is_left(self, short):
        assert "g2rpo on shapes: no step is left, into" in succeeded("train", "--resume", short)
        result = flowgrain("train", "--resume", short, "method.clip_range=1e-3")
        assert result.status == 0
        assert "no step is left, so method.clip_range=1e-3 has no effect" in result.stderr

    def test_settings_that_a_run_keeps(self, short):
        message = refused("train", "--resume", short, "sampling.num_steps=5")
        assert "sampling.num_steps=5: the run in" in message
        assert "must keep it" in message
        assert len(metrics_of(short)) == 1
        assert "method 'g2rpo'" in refused("train", "--resume", short, "method.name=flow_grpo")

    def test_a_directory_in_which_another_process_trains(self, short):
        lock = RunLock(short)
        lock.acquire()
        message = refused("train", "--resume", short, "training.max_steps=2")
        assert message.count("\n") == 1
        assert f"another process trains in this directory (host {socket.gethostname()}" in message
        assert len(metrics_of(short)) == 1
        lock.release()
        succeeded("train", "--resume", short, "training.max_steps=2")

    def test_settings_that_no_step_was_trained_with_are_not_recorded(self, short):
        settings = (short / "run.yaml").read_text()
        succeeded("train", "--resume", short, "optimizer.learning_rate=1e-9")
        assert (short / "run.yaml").read_text() == settings

    def test_a_run_without_its_checkpoints(self, short):
        shutil.rmtree(short / "checkpoints")
        assert "start a new run" in refused("train", "--resume", short)
        assert len(metrics_of(short)) == 1

    def test_damaged_metrics_are_reported(self, short):
        with (short / "metrics.jsonl").open("ab") as file:
            file.write(b'\xff{"step')
        result = flowgrain("train", "--resume", short, "training.max_steps=2")
        assert result.status == 0, result.stderr
        assert result.stderr.count("metrics.jsonl: line 2 is damaged (not UTF-8)") == 1
        assert [line["step"] for line in metrics_of(short)] == [1, 2]

    def test_fewer_steps_than_done(self, short):
        succeeded("train", "--resume", short, "training.max_steps=2")
        settings = (short / "run.yaml").read_text()
        message = refused("train", "--resume", short, "training.max_steps=1")
        assert "training.max_steps=1: the run in" in message
        assert "is already at step 2" in message
        assert (short / "run.yaml").read_text() == settings

    def test_words_that_contradict_it(self, short):
        assert "remove --out" in refused("train", "--resume", short, "--out", "other")
        assert "remove g2rpo" in refused("train", "--resume", short, "g2rpo")
        assert "not the directory of a run" in refused("train", "--resume", "nowhere")

    def test_a_run_with_objects_from_python(self, short):
        text = (short / "run.yaml").read_text()
        (short / "run.yaml").write_text(text.replace("given: []", "given: [rewards]"))
        message = refused("train", "--resume", short)
        assert "started from Python with custom rewards" in message

    def test_a_damaged_checkpoint(self, short):
        succeeded("train", "--resume", short, "training.max_steps=2")
        (short / "checkpoints/step-000002/manifest.json").write_text("{")
        result = flowgrain("train", "--resume", short, "training.max_steps=2")
        assert result.status == 0, result.stderr
        assert "The run continues from step 1." in result.stderr
        for path in (short / "checkpoints").glob("step-*/manifest.json"):
            path.write_text("{")
        result = flowgrain("train", "--resume", short)
        assert result.status == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("preset", [(), ("--preset", "one-gpu")])
def test_a_recipe_of_a_large_model(directory, preset):
    """flux/g2rpo with a prompt file, on a tiny model with the same architecture."""
    twins.flux(directory / "flux")
    (directory / "my_rewards.py").write_text(REWARD)
    (directory / "hpdv2.txt").write_text("a red cat\ntwo blue dogs\na green bird\n")
    changes = (
        "model.path=flux",
        "model.height=8",
        "model.width=8",
        "model.max_prompt_tokens=16",
        "runtime.dtype=float32",
        "rewards=[my_rewards:brightness]",
        "sampling.batch_size=128",
        "training.prompts_per_step=1",
        "training.max_steps=1",
        "evaluation.every=0",
        "method.group_size=3",
    )
    words = ("flux/g2rpo", "data.prompts=hpdv2.txt", *changes, *preset)
    succeeded("train", *words, "--out", "run")
    kind = "lora" if preset else "transformer"
    assert (directory / "run" / "export" / kind).is_dir()
    assert metrics_of(directory / "run")[0]["grad_norm"] > 0
    assert (directory / "embeddings").is_dir()

"""Requests: what cannot be requested, and the record in the output directory."""

import pytest
import yaml

from flowgrain.evaluation import make_request, run_evaluation
from flowgrain.evaluation.request import RECORD, read_record
from flowgrain.settings import SettingsError

SMALL = {"evaluation.num_prompts": 70, "evaluation.rewards": ["towers"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.seed=3"], r"runtime.seed=3: has no effect on an evaluation. Use --seeds"),
        (["evaluation.num_steps=3"], r"evaluation.num_steps=3: .* Use --steps"),
        (["training.max_steps=3"], r"training: has no effect on an evaluation. Remove"),
        (["lora.rank=3"], r"lora: has no effect"),
        (["sampling.num_stpes=3"], r"sampling.num_stpes"),
        (["evaluation.num_prompts=0"], r"evaluation.num_prompts=0"),
    ],
)
def test_overrides_without_an_effect(overrides, message):
    with pytest.raises(SettingsError, match=message):
        make_request(["base"], overrides)


def test_steps_and_seeds_are_distinct():
    with pytest.raises(SettingsError, match=r"--steps 2,2: give one or more numbers, each of them"):
        make_request(["base"], steps=[2, 2])
    with pytest.raises(SettingsError, match=r"--seeds "):
        make_request(["base"], seeds=[])
    with pytest.raises(SettingsError, match="There is no model to evaluate"):
        make_request([])


def test_the_default_directory_belongs_to_the_request():
    request = make_request(["base"], ["evaluation.num_prompts=2"], steps=[2])
    same = make_request(["base"], {"evaluation.num_prompts": 2}, steps=[3])
    other = make_request(["base"], ["evaluation.num_prompts=3"], steps=[2])
    assert request.default_directory == same.default_directory
    assert request.default_directory != other.default_directory
    assert request.default_directory.parts[0] == "evaluations"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"evaluation.num_prompts": 60}, "prompts"),
        ({"evaluation.rewards": []}, "metrics"),
        ({"sampling.batch_size": 5}, "overrides"),
    ],
)
def test_a_directory_keeps_its_evaluation(finished, trained, changes, name):
    _, folder = finished
    request = make_request(["base", str(trained / "full")], {**SMALL, **changes}, steps=[2])
    with pytest.raises(SettingsError, match=f"contains an evaluation with other {name}"):
        run_evaluation(request, folder)


def test_a_run_that_was_trained_further_is_another_model(trained, tmp_path):
    import shutil

    run, out = tmp_path / "full", tmp_path / "out"
    shutil.copytree(trained / "full", run)
    overrides = ["evaluation.num_prompts=2", "evaluation.rewards=[]"]
    request = make_request([str(run)], overrides, steps=[1])
    run_evaluation(request, out)
    (run / "checkpoints" / "step-000002").rename(run / "checkpoints" / "step-000003")
    later = make_request([str(run)], overrides, steps=[1])
    with pytest.raises(SettingsError, match="the weights of full have changed"):
        run_evaluation(later, out)
    assert later.default_directory != request.default_directory


def test_another_model_can_be_added(trained, tmp_path):
    overrides = ["evaluation.num_prompts=2", "evaluation.rewards=[]"]
    for words in (["base"], ["base", str(trained / "full")]):
        run_evaluation(make_request(words, overrides, steps=[1]), tmp_path / "out")
    # The settings of `base` are those of the first run, which has the same ones here.
    assert list(read_record(tmp_path / "out")["models"]) == ["base", "full"]


def test_a_record_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match=f"contains no evaluation .no {RECORD}."):
        read_record(tmp_path)
    for text in ("[", yaml.safe_dump({"metrics": []}), "text"):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(SettingsError, match="cannot be read"):
            read_record(tmp_path)
    (tmp_path / "file").write_text("")
    request = make_request(["base"], ["evaluation.num_prompts=1"], steps=[1])
    with pytest.raises(SettingsError, match=r"is a file\. Give a directory"):
        run_evaluation(request, tmp_path / "file")

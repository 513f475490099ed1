"""Running evaluations: interruptions, several processes, images, failures, objects from Python."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet
from toy import Toy, red

from flowgrain import Trainer
from flowgrain.evaluation import make_request, make_table, read_scores, run_evaluation
from flowgrain.evaluation import run as run_module
from flowgrain.evaluation.storage import image_path
from flowgrain.evaluation.targets import run_config
from flowgrain.settings import SettingsError


def test_scores_and_images(finished, trained):
    """The scores of a run are those that its trainer measures with the EMA parameters."""
    _, folder = finished
    columns = read_scores(folder)
    assert len(columns["oracle"]) == 2 * 2 * 2 * 70
    names = {"model", "steps", "seed", "place", "prompt", "oracle", "towers", "oracle/missing"}
    assert names <= set(columns)
    assert parquet.read_table(folder / "scores.parquet").num_rows == 560
    overrides = {"evaluation": {"num_prompts": 70, "rewards": ["towers"]}}
    trainer = Trainer(run_config(trained / "full", overrides), trained / "full")
    trainer.restore()
    own = trainer.evaluate(3)
    chosen = (columns["model"] == "full") & (columns["steps"] == 3) & (columns["seed"] == 0)
    order = np.argsort(columns["place"][chosen])
    np.testing.assert_array_equal(columns["oracle"][chosen][order], own.scores["oracle"])
    assert image_path(folder, "full", 3, 1, 69).exists()


def test_an_interruption_loses_at_most_a_chunk(finished, tmp_path, monkeypatch):
    request, folder = finished
    whole = read_scores(folder)
    shutil.copytree(folder, tmp_path / "cut")
    lost = sorted((tmp_path / "cut" / "scores" / "full").glob("*"))[1:3]
    for path in lost:
        path.unlink()
    written = []
    monkeypatch.setattr(
        run_module, "write_images", lambda folder, chunk, _: written.append(chunk.file(folder))
    )
    run_evaluation(request, tmp_path / "cut")
    assert sorted(written) == lost
    again = read_scores(tmp_path / "cut")
    for name in ("oracle", "towers"):
        np.testing.assert_array_equal(again[name], whole[name])


def test_a_damaged_chunk_is_evaluated_again(tmp_path, caplog):
    request = make_request(["base"], ["evaluation.num_prompts=2"], steps=[1])
    run_evaluation(request, tmp_path)
    whole = read_scores(tmp_path)
    (file,) = (tmp_path / "scores").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:50])
    run_evaluation(request, tmp_path)
    assert f"{file} is damaged" in caplog.text
    assert file.with_name(f"damaged-{file.name}.old").exists()
    np.testing.assert_array_equal(read_scores(tmp_path)["oracle"], whole["oracle"])


def test_ranks_share_the_chunks(finished, tmp_path, monkeypatch):
    request, folder = finished
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    progress = run_evaluation(request, tmp_path / "shared")
    assert (progress.finished, progress.total) == (8, 16)
    monkeypatch.setenv("RANK", "0")
    assert run_evaluation(request, tmp_path / "shared").finished == 16
    both, alone = read_scores(tmp_path / "shared"), read_scores(folder)
    np.testing.assert_array_equal(both["oracle"], alone["oracle"])


def test_images_can_be_added_later(tmp_path):
    overrides = ["evaluation.num_prompts=3", "evaluation.rewards=[]"]
    request = make_request(["shapes"], overrides, steps=[1])
    run_evaluation(request, tmp_path)
    assert not (tmp_path / "images").exists()
    shown = []
    run_evaluation(replace(request, keep_images=True), tmp_path, shown.append)
    assert image_path(tmp_path, "shapes", 1, 0, 2).exists()
    assert [(progress.finished, progress.total) for progress in shown] == [(1, 1)]


class Half:
    """A reward without a score for prompts with a circle, except `good` ones."""

    def __init__(self):
        self.good = []

    def __call__(self, images, prompts):
        missing = ["circle" in p.text and p.text not in self.good for p in prompts]
        return [float("nan") if is_missing else 1.0 for is_missing in missing]


def test_failures_are_counted_and_retried(tmp_path):
    half = Half()
    overrides = ["evaluation.num_prompts=8", "evaluation.rewards=[]"]
    request = make_request(["shapes"], overrides, steps=[1])

    def cell(request):
        run_evaluation(request, tmp_path, rewards={"half": half})
        return make_table(tmp_path).rows[0].cells["half"]

    first = cell(request)
    assert first.value.mean == 1
    assert first.failed + first.scored == 8
    assert first.failed > 0
    half.good = read_scores(tmp_path)["prompt"].tolist()
    assert cell(request).failed == first.failed  # not evaluated again
    assert cell(replace(request, retry_failed=True)).failed == 0
    half.good = []  # fewer scores than before: scores that exist stay
    assert cell(replace(request, retry_failed=True, keep_images=True)).failed == 0


def test_reward_batch_sizes(tmp_path):
    sizes = []

    def reward(images, prompts):
        sizes.append(len(images))
        return [0.0] * len(images)

    overrides = {
        "evaluation.num_prompts": 5,
        "evaluation.rewards": [],
        "rewards": [{"name": "mine", "batch_size": 2}],
    }
    request = make_request(["base"], overrides, steps=[1])
    run_evaluation(request, tmp_path, rewards={"mine": reward})
    assert sizes == [2, 2, 1]


@pytest.fixture
def from_python(tiny, tmp_path):
    """A run of a backbone and a reward from Python, and its backbone before training."""
    config = tiny.with_changes({"optimizer.learning_rate": 1e-2, "runtime.threads": 1})
    backbone = Toy()
    before = copy.deepcopy(backbone)
    trainer = Trainer(config, tmp_path / "run", backbone=backbone, rewards={"red": red})
    trainer.train()
    return trainer, before


def test_a_run_with_objects_from_python(from_python, tmp_path):
    trainer, backbone = from_python
    overrides = ["evaluation.num_prompts=4", "evaluation.rewards=[]"]
    request = make_request(["base", str(trainer.out)], overrides, steps=[3])
    state = {name: p.clone() for name, p in backbone.transformer.named_parameters()}
    given = {"rewards": {"red": red}}
    with pytest.raises(SettingsError, match=r"with its own rewards. Set rewards, or evaluate it"):
        run_evaluation(request, tmp_path / "out", backbone=backbone)
    run_evaluation(request, tmp_path / "out", backbone=backbone, **given)
    for name, parameter in backbone.transformer.named_parameters():
        torch.testing.assert_close(parameter, state[name], atol=0, rtol=0)
    columns = read_scores(tmp_path / "out")
    own = trainer.evaluate(3)
    trained = columns["model"] == "run"
    np.testing.assert_array_equal(columns["red"][trained], own.scores["red"])
    assert not np.array_equal(columns["red"][~trained], own.scores["red"])
    prompts = ["three", "two", "one", "zero"]
    with pytest.raises(SettingsError, match="with other prompts"):
        run_evaluation(request, tmp_path / "out", backbone=backbone, prompts=prompts, **given)
    run_evaluation(request, tmp_path / "other", backbone=backbone, prompts=prompts, **given)
    assert read_scores(tmp_path / "other")["prompt"].tolist() == prompts * 2


def test_a_run_needs_its_objects(from_python, tmp_path):
    trainer, _ = from_python
    request = make_request([str(trainer.out)], {"rewards": ["oracle"]}, steps=[1])
    with pytest.raises(SettingsError, match=r"started from Python with its own backbone"):
        run_evaluation(request, tmp_path / "out")


def test_a_run_needs_its_evaluation_prompts(tiny, tmp_path):
    """Otherwise the bundled prompts would be used silently."""
    trainer = Trainer(tiny, tmp_path / "run", eval_prompts=["one red circle"])
    trainer.recorder.start()
    request = make_request([str(trainer.out)], steps=[1])
    with pytest.raises(SettingsError, match=r"with its own prompts. Set data.eval_prompts"):
        run_evaluation(request, tmp_path / "out")
    run_evaluation(request, tmp_path / "out", prompts=["one red circle"])
    assert set(read_scores(tmp_path / "out")["prompt"]) == {"one red circle"}
    (tmp_path / "prompts.txt").write_text("two blue squares\n")
    overrides = {"data.eval_prompts": str(tmp_path / "prompts.txt")}
    run_evaluation(make_request([str(trainer.out)], overrides, steps=[1]), tmp_path / "other")
    assert set(read_scores(tmp_path / "other")["prompt"]) == {"two blue squares"}

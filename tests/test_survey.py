"""Evaluations: pieces, resuming, sharing among processes, the table against its definition, the page, what cannot be."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from flowgrain import Run, SettingsError
from flowgrain.training.evaluate import draw
from flowgrain.evaluation.published import DIMENSIONS, PUBLISHED, published
from flowgrain.report.side_by_side import section, write_side_by_side
from flowgrain.rewards import Explained, explained
from flowgrain.config.schema import settings
from flowgrain.evaluation.survey import (
    as_json,
    base_settings,
    bootstrap,
    default_folder,
    image_path,
    markdown,
    open_model,
    read_scores,
    run_survey,
    survey,
    tabulate,
    targets,
)

SMALL = {"eval_prompts": 70, "eval_rewards": "towers"}  # two pieces of 64 and 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of two steps, full and LoRA, with exports."""
    root = tmp_path_factory.mktemp("runs")
    values = {"num_steps": 4, "group_size": 3, "prompts_per_step": 2, "max_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.5}
    for name, more in (("full", {}), ("lora", {"lora_rank": 2})):
        Run(settings({**values, **more}), root / name).train()
    return root


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """Base and a run, at two step counts, from two seeds, with images."""
    folder = tmp_path_factory.mktemp("done") / "out"
    asked = survey(["base", str(trained / "full")], SMALL, [2, 3], [0, 1], keep_images=True)
    state = run_survey(asked, folder)
    assert (state.done, state.total) == (16, 16)
    return asked, folder


def test_raw_scores_and_images(done, trained):
    asked, folder = done
    data = read_scores(folder)
    assert len(data["oracle"]) == 2 * 2 * 2 * 70
    assert {"model", "steps", "seed", "place", "prompt", "oracle", "towers", "oracle/missing"} <= set(data)
    assert parquet.read_table(folder / "scores.parquet").num_rows == 560
    # The run's rows are what the run itself says of its averaged weights.
    run = Run(settings({**asked.settings.model_dump(), **SMALL}), trained / "full")
    run.restore()
    own = run.evaluate(3)
    there = (data["model"] == "full") & (data["steps"] == 3) & (data["seed"] == 0)
    order = np.argsort(data["place"][there])
    np.testing.assert_allclose(data["oracle"][there][order], own.scores["oracle"], atol=1e-6)
    assert image_path(folder, "full", 3, 1, 69).exists()


def test_the_table_is_its_definition(done):
    """Seeds are averaged within a prompt; differences are those of prompts; the first model has none."""
    _, folder = done
    data, table = read_scores(folder), tabulate(folder)
    rows = {(row.model, row.steps): row for row in table.rows}
    assert list(rows) == [("base", 2), ("full", 2), ("base", 3), ("full", 3)]

    def of_prompts(model, steps):
        there = (data["model"] == model) & (data["steps"] == steps)
        texts = sorted(set(data["prompt"][there]))
        return np.array([data["towers"][there & (data["prompt"] == text)].mean() for text in texts])

    before, after = of_prompts("base", 3), of_prompts("full", 3)
    cell = rows["full", 3].cells["towers"]
    assert cell.value.mean == pytest.approx(after.mean(), abs=1e-6)
    assert cell.difference.mean == pytest.approx((after - before).mean(), abs=1e-6)
    assert cell.difference.low < cell.difference.mean < cell.difference.high
    assert rows["base", 3].cells["towers"].difference is None
    assert cell.scored == 140
    there = (data["model"] == "full") & (data["steps"] == 3)
    assert rows["full", 3].parts["oracle"]["missing"] == pytest.approx(data["oracle/missing"][there].mean())
    text = "".join(markdown(table))
    assert f"| full | 3 | {rows['full', 3].cells['oracle'].value.mean:.3f} [" in text
    assert json.loads(as_json(table))["rows"][1]["cells"]["towers"]["difference"]["mean"] is not None
    assert [row.steps for row in tabulate(folder, steps=[3]).rows] == [3, 3]


def test_differences_are_between_images_that_both_sides_have(done, tmp_path):
    """The same scores on both sides, but one lacks those of a seed on which everybody is worse: no difference."""
    import pyarrow

    _, folder = done
    shutil.copytree(folder, tmp_path / "out")
    for model in ("base", "full"):
        for file in (tmp_path / "out" / "scores" / model).glob("*"):
            table = parquet.read_table(file)
            seed, place = (table.column(name).to_numpy() for name in ("seed", "place"))
            values = (place % 5) / 5 - 0.5 * seed
            if model == "full":
                values = np.where((seed == 1) & (place % 2 == 0), np.nan, values)
            index = table.column_names.index("towers")
            parquet.write_table(table.set_column(index, "towers", pyarrow.array(values)), file)
    cell = tabulate(tmp_path / "out", steps=[2]).rows[1].cells["towers"]
    assert cell.difference.mean == 0
    assert cell.failed == 35


def test_models_of_one_name_have_labels_of_their_own(trained, tmp_path):
    for place in ("x/run", "y/run", "x-run"):
        shutil.copytree(trained / "full", tmp_path / place)
    found = targets([str(tmp_path / place) for place in ("x/run", "y/run", "x-run")])
    assert len({one.label for one in found}) == 3


def test_another_models_lora_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    file = next((trained / "lora" / "export" / "lora").glob("*.safetensors"))
    state = load_file(file)
    save_file(
        {name.replace("transformer_blocks.0", "transformer_blocks.9"): v for name, v in state.items()}, tmp_path / "a.safetensors"
    )
    save_file({**state, "text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    for name, message in (("a", "the model takes 48 of its 64 tensors|another model's"), ("b", "text encoders")):
        (target,) = targets([str(tmp_path / f"{name}.safetensors")])
        with pytest.raises(SettingsError, match=message):
            open_model(target, base_settings([target], {}), {})


def test_images_that_are_wanted_later_are_made_later(trained, tmp_path):
    asked = survey(["shapes"], {"eval_prompts": 3, "eval_rewards": ""}, [1], [0])
    run_survey(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "images").exists()
    run_survey(replace(asked, keep_images=True), tmp_path / "out")
    assert image_path(tmp_path / "out", "shapes", 1, 0, 2).exists()


def test_a_stop_loses_a_piece_at_most(done, tmp_path, monkeypatch):
    asked, folder = done
    whole = read_scores(folder)
    shutil.copytree(folder, tmp_path / "cut")
    lost = sorted((tmp_path / "cut" / "scores" / "full").glob("*"))[1:3]
    for path in lost:
        path.unlink()
    made = []
    monkeypatch.setattr("flowgrain.evaluation.survey._keep_images", lambda found, piece, folder: made.append(piece.file))
    run_survey(asked, tmp_path / "cut")
    assert sorted(made) == lost
    again = read_scores(tmp_path / "cut")
    for name in ("oracle", "towers"):
        np.testing.assert_array_equal(again[name], whole[name])


def test_two_processes_share_the_work(done, tmp_path, monkeypatch):
    asked, folder = done
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    state = run_survey(asked, tmp_path / "shared")
    assert (state.done, state.total) == (8, 16)
    monkeypatch.setenv("RANK", "0")
    assert run_survey(asked, tmp_path / "shared").done == 16
    both, alone = read_scores(tmp_path / "shared"), read_scores(folder)
    np.testing.assert_array_equal(both["oracle"], alone["oracle"])


def test_exports_are_the_models_they_came_from(trained):
    """A run, its export, the export's folder and a LoRA file: the same pictures; the base's are others."""

    def picture(word):
        (target,) = targets([str(word)])
        policy, s = open_model(target, base_settings([target], {}), {})
        return draw(policy, s, ["two red circles"], 3, seed=5)

    base = picture("base")
    for name, part, atol in (("full", "transformer", 0.0), ("lora", "lora", 1e-6)):
        of_run = picture(trained / name)
        assert (of_run - base).abs().max() > 1e-4
        torch.testing.assert_close(picture(trained / name / "export"), of_run, atol=atol, rtol=0)
        torch.testing.assert_close(picture(trained / name / "export" / part), of_run, atol=atol, rtol=0)
    file = next((trained / "lora" / "export" / "lora").glob("*.safetensors"))
    torch.testing.assert_close(picture(file), picture(trained / "lora"), atol=1e-6, rtol=0)


def test_a_policy_that_only_samples_is_one_copy(trained):
    target = targets(["base"])[0]
    policy, _ = open_model(target, base_settings([target], {"dtype": "bfloat16", "ema_decay": 0.9}), {})
    assert policy.sampler is policy.transformer
    assert not policy.trained
    assert {p.dtype for p in policy.transformer.parameters()} == {torch.bfloat16}


def test_the_page(done):
    asked, folder = done
    page = write_side_by_side(folder, tabulate(folder), asked.seeds)
    text = page.read_text()
    sources = [part.split('"')[0] for part in text.split('src="')[1:]]
    assert len(sources) > 20
    assert all((folder / source).exists() for source in sources)
    data = read_scores(folder)
    found = section(folder, data, "towers", "base", "full", 3, [0, 1])
    losses, gains = ([one.gain for one in part] for part in (found.losses, found.gains))
    assert losses == sorted(losses)
    assert gains == sorted(gains, reverse=True)
    first = found.losses[0]
    there = (data["prompt"] == first.prompt) & (data["seed"] == first.seed) & (data["steps"] == 3)
    before, after = (data["towers"][there & (data["model"] == model)] for model in ("base", "full"))
    assert first.gain == pytest.approx((after - before).min())
    assert "Images were not kept" not in text


def test_failures_are_told_and_a_lone_model_needs_no_pair(tmp_path, monkeypatch):
    (tmp_path / "mine_survey.py").write_text(
        "good = ()\n"
        "def half(images, prompts):\n"
        "    return [float('nan') if 'circle' in p and p not in good else 1.0 for p in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = survey(["shapes"], {"eval_prompts": 8, "rewards": "mine_survey:half", "eval_rewards": ""}, [2], [0])
    run_survey(asked, tmp_path / "out")
    table = tabulate(tmp_path / "out")
    cell = table.rows[0].cells["mine_survey:half"]
    assert cell.value.mean == 1
    assert cell.failed + cell.scored == 8
    assert cell.failed > 0
    assert f"{cell.failed} not scored" in "".join(markdown(table))
    mine = sys.modules["mine_survey"]
    mine.good = read_scores(tmp_path / "out")["prompt"].tolist()
    run_survey(asked, tmp_path / "out")
    assert tabulate(tmp_path / "out").rows[0].cells["mine_survey:half"].failed == cell.failed
    run_survey(replace(asked, retry=True), tmp_path / "out")
    assert tabulate(tmp_path / "out").rows[0].cells["mine_survey:half"].failed == 0
    mine.good = ()  # a retry, for another reason, in which more fails than before: what was scored stays scored
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    run_survey(replace(asked, retry=True, keep_images=True), tmp_path / "again")
    assert tabulate(tmp_path / "again").rows[0].cells["mine_survey:half"].failed == 0
    assert "Images were not kept" in write_side_by_side(tmp_path / "out", table, [0]).read_text()


def asked_in_python():
    return settings({"num_steps": 4, "group_size": 3, "prompts_per_step": 2, "eval_rewards": ()})


@pytest.mark.parametrize(
    ("explain", "reason"),
    [
        (lambda images, prompts: torch.zeros(len(images)), "no attribute 'parts'"),
        (lambda images, prompts: Explained([1.0] * len(images), {"half": torch.zeros(1)}), "its part half has 1 values for 3"),
    ],
)
def test_a_reward_that_cannot_explain_itself_masks_and_goes_on(explain, reason):
    class Odd:
        mean_of_parts = False

        def __call__(self, images, prompts):
            return [1.0] * len(images)

    odd = Odd()
    odd.explain = explain
    scores, parts, _ = explained(odd, torch.zeros(3, 3, 2, 2), ["a", "b", "c"])
    assert scores.failed == 3
    assert reason in scores.reason
    assert parts == {}


def test_what_cannot_be(done, trained, tmp_path):
    _, folder = done
    full = str(trained / "full")
    for words, changes, message in (
        (["base", "nowhere"], {}, "nowhere: there is no such model"),
        (["base", "base"], {}, "stands there twice"),
        (["base", full], {**SMALL, "eval_prompts": 60}, "with other prompts"),
        (["base", full], {**SMALL, "eval_rewards": ""}, "with other metrics"),
        (["base", full], {**SMALL, "rows_per_pass": 5}, "with other settings"),
        ([full], {"num_steps": 5}, "was trained with 4 and keeps it"),
        ([full], {"ema_decay": 0.0}, "was trained with 0.5 and keeps it"),
        ([full], {"seed": 3}, "here it is --seeds that says so"),
        (["base"], {"rewards": "oracle", "reward_models": "orcale=x"}, "orcale is none of the rewards"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_survey(survey(words, changes, [2], [0]), folder)
    Run(asked_in_python(), tmp_path / "python", rewards={"mine": lambda images, _: [0.0] * len(images)}).record.start()
    with pytest.raises(SettingsError, match=r"given its rewards in Python; name some here: rewards="):
        survey([str(tmp_path / "python")], {}, [2], [0])
    with pytest.raises(SettingsError, match="names a value twice"):
        survey(["base"], {}, [2, 2], [0])
    with pytest.raises(SettingsError, match="nothing is evaluated here"):
        read_scores(tmp_path)
    # A run that went on since is another model: its old scores are not mixed with new ones.
    moved = tmp_path / "full"
    shutil.copytree(trained / "full", moved)
    asked = survey([str(moved)], {"eval_prompts": 2}, [2], [0])
    run_survey(asked, tmp_path / "moved")
    Path(moved / "checkpoints" / "step-000002").rename(moved / "checkpoints" / "step-000003")
    with pytest.raises(SettingsError, match="full has other weights now"):
        run_survey(survey([str(moved)], {"eval_prompts": 2}, [2], [0]), tmp_path / "moved")
    assert default_folder(asked) != default_folder(survey([str(moved)], {"eval_prompts": 2}, [2], [0]))
    file = next((tmp_path / "moved" / "scores").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SettingsError, match="cannot be read"):
        read_scores(tmp_path / "moved")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_bootstrap_intervals(values):
    """They hold the mean, move with the values, and of constants have no width."""
    found = bootstrap(np.array(values))
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    moved = bootstrap(np.array([*values, math.nan]) + 3)
    assert (moved.low, moved.high) == pytest.approx((found.low + 3, found.high + 3), abs=1e-6)


def test_bootstrap_covers_as_it_says():
    """200 samples of 40 exponentials; over 3,000 of them the interval held the true mean in 92 of 100."""
    rng = np.random.default_rng(3)
    held = [one.low <= 1 <= one.high for one in (bootstrap(rng.exponential(size=40)) for _ in range(200))]
    assert 0.87 <= np.mean(held) <= 0.98


def test_published_rows():
    assert {row.steps for row in published("flux", ["hps"], [10])} == {10, None}
    assert published("shapes", ["oracle"], [16]) == []
    for row in PUBLISHED["flux"]:
        if "unigenbench/overall" in row.scores:
            dimensions = [row.scores[f"unigenbench/{name}"] for name in DIMENSIONS]
            assert row.scores["unigenbench/overall"] == pytest.approx(np.mean(dimensions), abs=1e-4)

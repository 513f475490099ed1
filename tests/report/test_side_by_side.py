"""The page of an evaluation."""

import pytest
from pages import Page

from flowgrain.evaluation import make_request, make_table, read_scores, run_evaluation
from flowgrain.report import write_side_by_side
from flowgrain.report.side_by_side import compare_models


def test_the_page(evaluation):
    request, folder = evaluation
    page = Page(write_side_by_side(folder, make_table(folder), request.seeds).read_text())
    assert len(page.sources) > 20
    assert all((folder / source).exists() for source in page.sources)
    assert "2, 3 inference steps · seeds 0, 1 · all models use the same noise" in page.text
    assert "run compared with base by oracle, 3 steps: higher for" in page.text
    assert "did not keep its images" not in page.text


def test_losses_and_gains(evaluation):
    _, folder = evaluation
    columns = read_scores(folder)
    found = compare_models(folder, columns, "towers", "base", "run", 3, [0, 1])
    losses, gains = ([d.gain for d in part] for part in (found.losses, found.gains))
    assert losses == sorted(losses)
    assert gains == sorted(gains, reverse=True)
    assert found.better + found.worse <= 1
    first = found.losses[0]
    chosen = (
        (columns["prompt"] == first.prompt)
        & (columns["seed"] == first.seed)
        & (columns["steps"] == 3)
    )
    before, after = (columns["towers"][chosen & (columns["model"] == m)] for m in ("base", "run"))
    assert first.gain == pytest.approx((after - before).min())
    assert [image.score for image in first.images] == pytest.approx(
        [first.images[0].score, first.images[0].score + first.gain]
    )


def test_a_single_model(tmp_path):
    for keep_images in (False, True):
        overrides = ["evaluation.num_prompts=3"]
        request = make_request(["shapes"], overrides, steps=[1], keep_images=keep_images)
        run_evaluation(request, tmp_path)
        page = Page(write_side_by_side(tmp_path, make_table(tmp_path), [0]).read_text())
        assert len(page.sources) == 3 * keep_images
        assert ("did not keep its images" in page.text) != keep_images
        assert "same noise" not in page.text

"""Numbers from papers."""

import numpy as np
import pytest

from flowgrain.evaluation.published import all_published, published


def test_rows_at_the_measured_steps():
    assert {row.steps for row in published("flux", ["hps"], [10])} == {10, None}
    assert published("flux", ["aesthetic"], [10]) == []
    assert published("shapes", ["oracle"], [16]) == []


def test_the_overall_result_is_the_mean_of_the_dimensions():
    rows = [row for row in all_published() if "unigenbench/overall" in row.scores]
    assert len(rows) == 5
    for row in rows:
        scores = dict(row.scores)
        overall = scores.pop("unigenbench/overall")
        assert len(scores) == 10
        assert overall == pytest.approx(np.mean(list(scores.values())), abs=1e-4)


def test_the_rows_are_complete():
    rows = all_published()
    assert {(row.model, row.paper) for row in rows} == {
        ("flux", "G2RPO, arXiv 2510.01982"),
        ("sd3", "DenseGRPO, arXiv 2601.20218"),
        ("sd3", "MEND, arXiv 2610.05954"),
    }
    keys = [(row.model, row.label, row.steps, *row.scores) for row in rows]
    assert len(set(keys)) == len(keys) == 38

"""Checkpoints: which ones stay, full disks, kills while one is written, and damaged files."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowgrain.training import checkpoint
from flowgrain.training.checkpoint import CheckpointError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def save(folder, step, score=None, keep=2):
    return checkpoint.save(folder, step, {"a": torch.ones(3)}, {"b": 1}, score, keep)


def tensor_in(path):
    found = {"a": torch.zeros(3)}
    checkpoint.read(path, found)
    return found["a"].tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowgrain.distributed.storage.save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-000001"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]
    assert tensor_in(tmp_path / "step-000001") == [1, 1, 1]
    with pytest.raises(CheckpointError, match="There is no earlier checkpoint"):
        save(tmp_path / "other", 1)


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3)):
        save(tmp_path, step, score, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert checkpoint.best(tmp_path).name == "step-000002"


def test_a_score_that_is_not_finite_is_not_the_best(tmp_path):
    for step, score in ((1, float("nan")), (2, 0.9), (3, 0.1)):
        save(tmp_path, step, score, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_without_scores_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    assert checkpoint.best(tmp_path) is None


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(tmp_path):
    assert checkpoint.load_last_good(tmp_path) == (None, {}, [])
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="No undamaged checkpoint is left"):
        checkpoint.load_last_good(tmp_path)


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path):
    save(tmp_path, 1)
    # The moment between the two renames.
    (tmp_path / "step-000001").rename(tmp_path / ".old-step-000001")
    (tmp_path / ".tmp-step-000001").mkdir()
    checkpoint.repair(tmp_path)
    path, state, damaged = checkpoint.load_last_good(tmp_path)
    assert path is not None
    assert state == {"b": 1}
    assert tensor_in(path) == [1, 1, 1]
    assert damaged == []
    assert names(tmp_path) == ["step-000001"]


def test_a_kill_after_a_checkpoint_was_replaced_leaves_the_new_one(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".old-step-000001").mkdir()
    checkpoint.repair(tmp_path)
    assert names(tmp_path) == ["step-000001"]


def test_a_tensor_that_is_missing_or_of_another_shape_is_an_error(tmp_path):
    path = save(tmp_path, 1)
    for tensors in ({"other": torch.zeros(3)}, {"a": torch.zeros(4)}):
        with pytest.raises(CheckpointError, match="belongs to another model"):
            checkpoint.read(path, tensors)


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A disk that changes a value is noticed while the earlier checkpoint still exists."""
    from flowgrain.distributed import storage

    save(tmp_path, 1)
    write = storage.save

    def wrong(tensors, **options):
        return write({name: value + 1 for name, value in tensors.items()}, **options)

    monkeypatch.setattr("flowgrain.distributed.storage.save", wrong)
    with pytest.raises(CheckpointError, match="differs from the written value"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=30), plain)
def test_any_changed_byte_or_other_manifest_is_damage(tmp_path, place, noise, manifest):
    path = checkpoint.save(tmp_path, 1, {"a": torch.arange(9.0)}, {"b": 1}, None, keep=1)
    file = next(path.glob("*.safetensors"))
    whole = file.read_bytes()
    place %= len(whole)
    changed = whole[:place] + noise + whole[place + len(noise) :]
    file.write_bytes(changed)
    if changed != whole:
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(path)
    file.write_bytes(whole)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)

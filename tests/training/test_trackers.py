"""Trackers: what each library stores, resumed and killed runs, and trackers that fail."""

import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy import Toy, red
from tracked import (
    ASIDE,
    read_tensorboard,
    read_trackio,
    read_wandb,
    tracked_trainer,
)

from flowgrain import RunStopped, SettingsError, Trainer, load_config
from flowgrain.records.alarms import read_alarms
from flowgrain.training.alarms import Finding
from flowgrain.training.trackers import base, fan_out, worker

READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
ALARM = {"step": 2, "monitor": "edge_density", "message": "step 2: edges are gone | really"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Directories of the libraries. Trackio reads its own when it is imported."""
    folder = tmp_path_factory.mktemp("libraries")
    changes = {
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        **{f"WANDB_{k}_DIR": str(folder / "wandb") for k in ("CACHE", "CONFIG", "DATA")},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(params=READERS)
def tracker(request, storage, monkeypatch):
    """The name of a tracker whose library is installed."""
    if request.param == "trackio":
        monkeypatch.syspath_prepend(ASIDE)
    pytest.importorskip(request.param)
    return request.param


def test_a_tracker_gets_all_records(tracker, tmp_path):
    trainer = tracked_trainer(tmp_path, [tracker])

    def alarm(line):
        if line["step"] == 2:
            trainer.recorder.write_alarms([ALARM])

    trainer.train(progress=alarm)
    stored = READERS[tracker](tmp_path)
    assert stored.steps("reward/red") == [1, 2, 3, 4]
    assert stored.steps("eval/red") == [0, 2, 4]
    lines = trainer.recorder.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose([value for _, value in stored.scalars["loss"]], losses, rtol=1e-6)
    assert stored.config["sampling"]["num_steps"] == 4
    evaluation, group = stored.tables["evaluation"], stored.tables["group"]
    assert list(evaluation) == [0, 2, 4]
    assert list(group) == [1, 2, 4]
    assert set(evaluation[0]) >= {"prompt", "reward/red", "monitor/dark"}
    assert set(group[1]) >= {"prompt", "reward/red", "monitor/dark", "advantage"}
    assert stored.images["evaluation"] == 4
    assert stored.images["group"] == len(trainer.config.tree().leaves)
    ((step, text),) = stored.alarms
    assert step == 2
    assert "edges are gone | really" in text
    assert json.loads((tmp_path / "alarms.jsonl").read_text()) == ALARM
    if tracker != "tensorboard":
        ((*files,),) = stored.artifacts
        assert files == ["transformer/weights.pt"]


@pytest.mark.slow
def test_a_killed_run_continues_in_the_same_run_of_the_tracker(tracker, tmp_path):
    script = Path(__file__).with_name("tracked.py")
    paths = os.pathsep.join([*(p for p in sys.path if p), *([str(ASIDE)] * (tracker == "trackio"))])
    # The service of wandb in this process would keep the killed run open.
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    killed = subprocess.run(
        [sys.executable, script, tmp_path, tracker],
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        check=False,
    )
    assert killed.returncode < 0, killed.stderr
    identity = (tmp_path / "trackers.json").read_text()
    before = READERS[tracker](tmp_path) if tracker != "wandb" else None
    if before is not None:
        assert before.steps("reward/red") == [1, 2, 3]

    again = tracked_trainer(tmp_path, [tracker])
    again.resume()
    again.train()
    assert (tmp_path / "trackers.json").read_text() == identity
    stored = READERS[tracker](tmp_path)
    if tracker == "tensorboard":
        assert stored.steps("reward/red") == [1, 2, 3, 4]
        assert stored.steps("eval/red") == [0, 2, 4]
    elif tracker == "trackio":  # which deletes nothing: step 3 was trained twice
        assert sorted(stored.steps("reward/red")) == [1, 2, 3, 3, 4]
        assert len(set(stored.scalars["reward/red"])) == 4  # with the same result
    else:  # wandb keeps up to 32 KiB in memory, which a kill loses
        assert stored.steps("reward/red")[-2:] == [3, 4]
        ids = {file.stem for file in tmp_path.glob("wandb/offline-run-*/*.wandb")}
        assert ids == {f"run-{json.loads(identity)['id']}"}


class Fake:
    """A tracker without a library."""

    def __init__(self, run):
        self.calls, self.closed = [], False

    def scalars(self, step, values):
        self.calls.append(step)

    def images(self, name, table):
        self.calls.append(name)

    def alarm(self, step, title, message):
        self.calls.append(title)

    def artifact(self, folder):
        self.calls.append(folder.name)

    def close(self):
        self.closed = True


def fail(*_):
    raise ConnectionError("no route to host")


def leave(*_):
    raise SystemExit(1)


def replace_wandb(monkeypatch, kind):
    """Let `kind` be the tracker "wandb"."""
    monkeypatch.setitem(fan_out._KINDS, "wandb", kind)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "runtime.trackers" in r.getMessage()]


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_alarm_and_the_best_checkpoint(tmp_path, monkeypatch, action):
    """Both are logged also if the alarm stops the run."""
    opened = []

    class Opened(Fake):
        def __init__(self, run):
            super().__init__(run)
            opened.append(self)

    replace_wandb(monkeypatch, Opened)
    found = [[], [Finding("dark", "up", 0.3, 0.2, 0.4, 0.1)], []]  # of steps 2, 4 and 6
    monkeypatch.setattr("flowgrain.training.watch.find", lambda *_: found.pop(0))
    changes = {"watch.action": action, "training.max_steps": 6}
    trainer = tracked_trainer(tmp_path, ["wandb"], changes)
    if action == "stop":
        with pytest.raises(RunStopped, match="step 4: alarm"):
            trainer.train()
    else:
        trainer.train()
    (tracker,) = opened
    assert tracker.calls.count("Alarm: dark") == 1
    assert tracker.calls[-1] == "best"
    assert [alarm["step"] for alarm in read_alarms(tmp_path)] == [4]


@pytest.mark.parametrize(
    ("method", "error", "shown"),
    [
        ("__init__", fail, "ConnectionError: no route to host"),
        ("scalars", fail, "ConnectionError: no route to host"),
        ("images", leave, "SystemExit: 1"),
        ("close", fail, "ConnectionError: no route to host"),
    ],
)
def test_a_tracker_that_fails_is_switched_off_with_one_warning(
    tmp_path, monkeypatch, caplog, method, error, shown
):
    replace_wandb(monkeypatch, type("Failing", (Fake,), {method: error}))
    lines = tracked_trainer(tmp_path, ["wandb"]).train()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    (message,) = warnings_of(caplog)
    assert message.startswith(f"runtime.trackers: wandb is switched off ({shown}). The run goes on")


def test_a_tracker_that_hangs_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    released = threading.Event()
    monkeypatch.setattr(worker, "PENDING", 3)
    replace_wandb(monkeypatch, type("Hanging", (Fake,), {"scalars": lambda *_: released.wait(60)}))
    trainer = tracked_trainer(tmp_path, ["wandb"])
    assert len(trainer.train()) == 5
    released.set()
    (message,) = warnings_of(caplog)
    assert "it is 3 records behind" in message


def test_the_end_of_a_run_waits_for_a_limited_time(caplog):
    released, opened = threading.Event(), []

    def opens():
        opened.append(type("Hanging", (Fake,), {"scalars": lambda *_: released.wait(60)})(None))
        return opened[0]

    hanging = worker.Worker("wandb", opens)
    hanging.submit(lambda tracker: tracker.scalars(1, {}))
    hanging.close(seconds=0.05)
    assert "it did not end within 0.05 seconds" in warnings_of(caplog)[0]
    hanging.submit(lambda tracker: tracker.alarm(1, "late", ""))
    released.set()
    hanging._thread.join(10)
    assert opened[0].calls == []  # nothing after it was switched off
    assert opened[0].closed
    assert len(warnings_of(caplog)) == 1


def test_a_tracker_that_is_behind_keeps_no_records(monkeypatch, caplog):
    monkeypatch.setattr(worker, "PENDING", 3)
    released, started = threading.Event(), threading.Event()

    def hang(tracker):
        started.set()
        released.wait(60)

    hanging = worker.Worker("wandb", lambda: Fake(None))
    hanging.submit(hang)
    assert started.wait(10)
    for _ in range(4):
        hanging.submit(fail)
    assert "it is 3 records behind" in warnings_of(caplog)[0]
    assert list(hanging._tasks.queue) == [None]  # wakes the thread
    released.set()
    hanging._thread.join(10)
    assert not hanging._thread.is_alive()


def test_a_tracker_that_failed_is_closed_so_that_earlier_records_are_kept(monkeypatch, tmp_path):
    opened = []

    class Failing(Fake):
        def __init__(self, run):
            super().__init__(run)
            opened.append(self)

        alarm = fail

    replace_wandb(monkeypatch, Failing)
    config = load_config("g2rpo", {"runtime.trackers": ["wandb"]})
    trackers = fan_out.open_trackers(config, tmp_path, None)
    trackers.scalars({"step": 1, "loss": float("nan"), "kl": 0.5})
    trackers.alarm(ALARM)
    trackers.scalars({"step": 2})
    trackers.close()
    assert opened[0].calls == [1]
    assert opened[0].closed


def test_a_new_run_gets_a_new_identity_and_a_resumed_run_keeps_it(tmp_path):
    new = fan_out._identity(tmp_path, resumed=False)
    assert fan_out._identity(tmp_path, resumed=True) == new
    assert fan_out._identity(tmp_path, resumed=False) != new
    (tmp_path / "trackers.json").write_text('{"id": "../x"}')
    repaired = fan_out._identity(tmp_path, resumed=True)
    assert repaired.isalnum()
    assert fan_out._identity(tmp_path, resumed=True) == repaired


def test_a_large_group_shows_the_highest_and_lowest_advantages():
    values = [0.0, 5.0, float("nan"), -1.0, 2.0, 1.0]
    assert fan_out._highest_and_lowest(values, 6) == [0, 1, 2, 3, 4, 5]
    assert fan_out._highest_and_lowest(values, 4) == [0, 1, 3, 4]


def test_large_images_are_reduced_and_small_ones_are_not():
    large, small = np.zeros((512, 1024, 3), np.uint8), np.ones((64, 48, 3), np.uint8)
    assert fan_out._small(large).shape == (128, 256, 3)
    assert (fan_out._small(small) == small).all()


def test_without_trackers_nothing_is_written(tiny, tmp_path):
    Trainer(tiny, tmp_path, backbone=Toy(), rewards={"red": red}).train()
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("name", READERS)
def test_a_library_that_is_not_installed_is_an_error_before_the_run(
    tiny, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, base.TRACKERS[name], None)
    config = tiny.with_changes({"runtime.trackers": [name]})
    with pytest.raises(SettingsError, match=rf"trackers: {name} is not .*pip install {name}"):
        Trainer(config, tmp_path / "run", backbone=Toy(), rewards={"red": red})
    assert not (tmp_path / "run").exists()


def test_the_former_name_of_the_setting(tiny, tmp_path):
    with pytest.raises(SettingsError, match=r"^runtime\.loggers .*It is runtime\.trackers now"):
        load_config("g2rpo", {"runtime.loggers": ["wandb"]})
    values = {"config": tiny.to_dict()}
    del values["config"]["runtime"]["trackers"]
    values["config"]["runtime"]["loggers"] = ["wandb"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path).runtime.trackers == ("wandb",)


def test_wandb_is_offline_and_reports_nothing_unless_the_user_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # is restored at the end
        monkeypatch.delenv(name)
    base.import_library("wandb")
    assert base.wandb_mode() == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    base.import_library("wandb")
    assert base.wandb_mode() == "online"
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"

"""Run directories that something else has changed: locks, lost checkpoints, damaged records."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket

import pytest
from toy import PROMPTS, Toy, red

from flowgrain import SettingsError, Trainer
from flowgrain.records.metrics import read_metrics
from flowgrain.records.run_lock import HOLDER, RunLock

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def three(tiny):
    """Three steps with checkpoints after every step, and evaluations."""
    return tiny.with_changes(
        {"training.max_steps": 3, "training.checkpoint_every": 1, "evaluation.every": 1}
    )


def toy(config, folder):
    given = {"prompts": PROMPTS, "eval_prompts": PROMPTS, "rewards": {"red": red}}
    return Trainer(config, folder, backbone=Toy(), **given)


def contents(folder):
    """The bytes of all files of a run, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_times(lines):
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def refusal(work):
    """The message of the refused `work`, which is one line."""
    with pytest.raises(SettingsError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


class TestLock:
    """One process at a time trains in a directory."""

    def test_a_second_run_in_the_directory_is_refused(self, three, tmp_path):
        messages = []

        def second(metrics):
            before = contents(tmp_path)
            messages.append(refusal(toy(three, tmp_path).resume))
            assert contents(tmp_path) == before

        lines = toy(three, tmp_path).train(second)
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert len(messages) == 3
        holder = rf"host {re.escape(socket.gethostname())}, process {os.getpid()}, since \d{{4}}-"
        assert re.search(rf"^{tmp_path}: another process trains .*{holder}", messages[0])
        assert not (tmp_path / HOLDER).exists()
        assert toy(three, tmp_path).resume() == []

    def test_two_new_runs_in_a_directory(self, three, tmp_path):
        """The second starts before the first has written its metrics."""
        lock = RunLock(tmp_path / "run")
        lock.acquire()
        assert "another process trains" in refusal(toy(three, tmp_path / "run").train)
        assert set(contents(tmp_path / "run")) == {HOLDER}

    def test_the_file_says_who_has_the_lock(self, tmp_path):
        lock = RunLock(tmp_path)
        assert lock.acquire() == []
        holder = json.loads((tmp_path / HOLDER).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", holder["started"])
        assert lock.acquire() == []  # it is held
        lock.release()
        assert not (tmp_path / HOLDER).exists()
        lock.release()

    def test_a_killed_process_is_taken_over(self, three, tmp_path):
        toy(three.with_changes({"training.max_steps": 1}), tmp_path).train()

        def hold(ready):
            lock = RunLock(tmp_path)
            lock.acquire()
            ready.set()
            signal.pause()

        ready = FORK.Event()
        process = FORK.Process(target=hold, args=(ready,))
        process.start()
        assert ready.wait(20)
        message = refusal(toy(three, tmp_path).resume)
        assert f"process {process.pid}, since" in message
        process.kill()
        process.join()
        again = toy(three, tmp_path)
        (message,) = again.resume()
        assert re.search(
            rf"has ended \(host .*, process {process.pid}, since .*taken over", message
        )
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
        assert [line["step"] for line in again.train()] == [0, 1, 2, 3]

    def test_a_lock_of_another_host_is_refused(self, three, tmp_path):
        toy(three, tmp_path).train()
        holder = {"host": "node7", "pid": 1, "started": "2026-01-02 03:04:05+00:00"}
        (tmp_path / HOLDER).write_text(json.dumps(holder))
        before = contents(tmp_path)
        message = refusal(toy(three, tmp_path).resume)
        assert "host node7, process 1, since 2026-01-02 03:04:05+00:00" in message
        assert message.endswith(f"If it has ended, delete {tmp_path / HOLDER}.")
        assert contents(tmp_path) == before
        (tmp_path / HOLDER).unlink()
        assert toy(three, tmp_path).resume() == []

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 3}'])
    def test_a_damaged_holder_never_gives_a_traceback(self, tmp_path, text):
        (tmp_path / HOLDER).write_text(text)
        message = refusal(RunLock(tmp_path).acquire)
        assert f"delete {tmp_path / HOLDER}" in message

    def test_a_refused_or_deleted_trainer_releases_the_lock(self, three, tmp_path):
        toy(three, tmp_path).train()
        other = three.with_changes({"runtime.seed": 5})
        assert "runtime.seed=5" in refusal(toy(other, tmp_path).resume)
        lock = RunLock(tmp_path)
        lock.acquire()
        del lock
        assert RunLock(tmp_path).acquire() == []


class TestLostCheckpoints:
    """A run without its checkpoints does not start again from step 0."""

    @pytest.mark.parametrize("what", ["directory", "checkpoints"])
    def test_a_resume_is_refused(self, three, tmp_path, what):
        toy(three, tmp_path).train()
        shutil.rmtree(tmp_path / "checkpoints")
        if what == "checkpoints":
            (tmp_path / "checkpoints").mkdir()
        before = contents(tmp_path)
        message = refusal(toy(three, tmp_path).resume)
        assert message.startswith(f"{tmp_path / 'checkpoints'}: the checkpoints of this run are")
        assert "trained to step 3" in message
        assert message.endswith(f"flowgrain train {tmp_path} --out NEW_DIRECTORY")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("every", [0, 3, 100])
    def test_a_resume_is_refused_after_the_only_checkpoint(self, three, tmp_path, every):
        """The checkpoint at the end of a run, which checkpoint_every does not announce."""
        config = three.with_changes({"training.checkpoint_every": every})
        toy(config, tmp_path).train()
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").mkdir()
        assert "trained to step 3" in refusal(toy(config, tmp_path).resume)

    @pytest.mark.parametrize("metrics", [b"", b'{"step": 0}\n', b'{"step": 0}\n{"step": 1}\n'])
    def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
        self, three, tmp_path, metrics
    ):
        toy(three, tmp_path).train()
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / ".saved").unlink()
        (tmp_path / "metrics.jsonl").write_bytes(metrics)
        again = toy(three, tmp_path)
        assert again.resume() == []
        assert [line["step"] for line in again.train()] == [0, 1, 2, 3]


DAMAGED_METRICS = {
    "truncated last line": (lambda text: text[:-30], "line 4 is damaged (not JSON)"),
    "last line without its end": (lambda text: text.rstrip(b"\n"), None),
    "invalid UTF-8": (lambda text: text.replace(b"loss", b"lo\xffs", 1), "not UTF-8"),
    "invalid UTF-8 alone": (lambda text: text + b"\xff\xfe\x00\n", "line 5 is damaged (not UTF-8)"),
    "broken JSON": (lambda text: text.replace(b"}", b"", 1), "line 1 is damaged (not JSON)"),
    "zeros": (lambda text: text + b"\0" * 5000, "line 5 is damaged (not JSON)"),
    "zeros only": (lambda text: b"\0" * len(text), "line 1 is damaged (not JSON)"),
    "an array": (lambda text: b"[1]\n" + text, "line 1 is damaged (not a JSON object)"),
    "no step": (lambda text: text.replace(b'"step": 2', b'"stop": 2'), "line 3 is damaged (no st"),
    "a text as step": (lambda text: text.replace(b'"step": 2', b'"step": "2"'), "(no step)"),
    "a text as value": (lambda text: text + b'{"step": 2, "loss": "x"}\n', "loss is not a number"),
    "deep JSON": (lambda text: text + b"[" * 100_000 + b"\n", "line 5 is damaged (not JSON)"),
    "a large integer": (lambda text: text + b'{"step": ' + b"9" * 9999 + b"}\n", "(not JSON)"),
    "many lines": (lambda text: text + b"x\n" * 9, "lines 5, 6, 7, 8, 9 and 4 more are damaged"),
    "a line twice": (lambda text: text + text.splitlines(keepends=True)[-1], None),
    "empty": (lambda text: b"", None),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of a run of three steps, to be copied."""
    from flowgrain import load_config

    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "method.granularities": [1, 2],
        "training.prompts_per_step": 2,
        "training.max_steps": 3,
        "training.checkpoint_every": 1,
        "evaluation.every": 1,
        "evaluation.num_prompts": 4,
        "evaluation.num_steps": 4,
        "evaluation.rewards": [],
    }
    config = load_config("g2rpo", changes)
    toy(config, folder).train()
    return config, folder


@pytest.mark.parametrize("name", DAMAGED_METRICS)
def test_damaged_metrics_are_set_aside_and_restored_from_the_checkpoint(trained, tmp_path, name):
    damage, reason = DAMAGED_METRICS[name]
    config, whole = trained
    run, file = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    shutil.copytree(whole, run)
    before = file.read_bytes()
    damaged = damage(before)
    file.write_bytes(damaged)
    longer = config.with_changes({"training.max_steps": 4})
    again = toy(longer, run)
    messages = again.resume()
    assert file.read_bytes() == before  # what the checkpoint has
    aside = run / "metrics.damaged.jsonl"
    if reason is None:
        assert messages == []
        assert not aside.exists()
    else:
        (message,) = messages
        assert message.startswith(f"{file}: line")
        assert reason in message
        assert message.endswith(". Moved to metrics.damaged.jsonl")
        good = before.splitlines()
        assert next(line for line in damaged.splitlines() if line not in good) in aside.read_bytes()
    assert [line["step"] for line in again.train()] == [0, 1, 2, 3, 4]
    assert toy(longer, run).resume() == []  # reported once


def test_the_metrics_are_those_of_the_last_good_checkpoint(trained, tmp_path):
    """The last checkpoint is damaged, and so is the line of the step before it."""
    config, whole = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "step-000003" / "manifest.json").write_text("{")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:20] + b"\n" + lines[3])
    again = toy(config, run)
    assert len(again.resume()) == 2
    assert again.steps_done == 2
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:3])
    again.train()
    assert without_times(read_metrics(run)) == without_times(read_metrics(whole))


def test_a_manifest_does_not_grow_with_the_run(trained):
    _, whole = trained
    sizes = [len(m.read_bytes()) for m in sorted(whole.glob("checkpoints/*/manifest.json"))]
    assert len(sizes) >= 2
    assert max(sizes) - min(sizes) < 50


def test_damaged_metrics_of_a_checkpoint_damage_the_checkpoint(trained, tmp_path):
    config, whole = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "step-000003" / "metrics.jsonl").write_text("")
    again = toy(config, run)
    (message,) = again.resume()
    assert "the checksum of metrics.jsonl does not match" in message
    assert again.steps_done == 2


def test_a_reader_leaves_damaged_lines_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    (record,) = caplog.records  # the last line may still be being written
    assert f"{tmp_path / 'metrics.jsonl'}: line 2 is damaged (not UTF-8)" in record.getMessage()


DAMAGED_FILES = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "invalid UTF-8": lambda text: b"\xff\xfe" + text,
    "zeros": lambda text: b"\0" * len(text),
    "a list": lambda text: b"[]",
    "null": lambda text: b"null",
    "deep JSON": lambda text: b'{"a":' * 100_000,
}
DAMAGED_EVALUATIONS = DAMAGED_FILES | {
    "no scores": lambda text: text.replace(b'"scores"', b'"other"'),
    "a text as score": lambda text: re.sub(rb'("red": \[)[-\d.]+', rb'\1"x"', text),
    "too few scores": lambda text: re.sub(rb'("red": \[)[-\d.]+, ', rb"\1", text),
    "scores without rewards": lambda text: re.sub(rb'"scores": \{.*?\}', b'"scores": [1]', text),
    "a text as step": lambda text: text.replace(b'"step": 2', b'"step": "2"'),
    "numbers as prompts": lambda text: re.sub(rb'"prompts": \[.*?\]', b'"prompts": [1]', text),
}
FILES = [("evaluations/step-000002.json", name) for name in DAMAGED_EVALUATIONS]
DAMAGED_ZIPS = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "another file": lambda content: b"PK\x05\x06" + b"\0" * 18,
}
FILES += [("groups/step-000002.zip", name) for name in DAMAGED_ZIPS]
FILES += [("evaluations/images-000002.zip", name) for name in list(DAMAGED_ZIPS)[:3]]


@pytest.mark.parametrize(("path", "name"), FILES)
def test_damaged_evaluations_and_groups_are_set_aside(trained, tmp_path, path, name):
    config, whole = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / path
    damage = DAMAGED_ZIPS if path.endswith(".zip") else DAMAGED_EVALUATIONS
    damaged = damage[name](file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    again = toy(config.with_changes({"training.max_steps": 4}), run)
    (message,) = again.resume()
    assert message.startswith(f"{file}: damaged (")
    assert message.endswith(f"renamed to damaged-{file.name}")
    assert not file.exists()
    assert file.with_name(f"damaged-{file.name}").read_bytes() == damaged
    assert [line["step"] for line in again.train()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["step-copy-1x.json", "tree-3 (copy).png", "a-9", "x-00000009.txt"]
)
def test_files_of_others_stay(trained, tmp_path, name):
    config, whole = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for part in ("evaluations", "groups"):
        (run / part / name).write_text("mine")
    assert toy(config, run).resume() == []
    assert all((run / part / name).read_text() == "mine" for part in ("evaluations", "groups"))

"""Mistakes of a first hour: each is one line with the fix, and writes nothing."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import SMALL, flowgrain, refused, succeeded

from flowgrain.rewards import RewardConfig, build_reward, reachable
from flowgrain.training.health import smaller_rate

PROMPT = ("--prompt", "three green circles", "--steps", "1")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Every command runs in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    succeeded("train", "g2rpo", *SMALL, "evaluation.every=1", "--out", folder)
    return folder


@pytest.fixture
def run(trained, directory):
    shutil.copytree(trained, directory / "run")
    return directory / "run"


def rewards_file(folder, text, name="mine"):
    sys.modules.pop(name, None)
    (folder / f"{name}.py").write_text(text)


COMMANDS = [("sample", "run", *PROMPT), ("evaluate", "run", "--steps", "1")]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_trained_run_without_checkpoints_is_not_the_base_model(run, words):
    shutil.rmtree(run / "checkpoints")
    lost = "error: run: trained to step 2, but it has no checkpoint. Restore run/checkpoints"
    base = " For the untrained model, use base.\n"
    assert refused(*words) == f"{lost}, or use its export run/export.{base}"
    shutil.rmtree(run / "export")
    assert refused(*words) == f"{lost}, or name an export.{base}"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_run_that_was_never_trained_is_the_base_model_in_one_line(run, words, caplog):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    succeeded(*words)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["run: not trained yet. The base model is used."]


def test_the_history_of_a_run_also_says_that_it_was_trained(run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    with (run / "run.yaml").open("a") as file:
        file.write("\n")
    text = (run / "run.yaml").read_text().replace("history: []", "history: [{first_step: 8}]")
    (run / "run.yaml").write_text(text)
    assert "trained to step 7" in refused("sample", "run", *PROMPT)


def test_an_export_without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    message = refused("export", "run")
    assert "run/checkpoints: the checkpoints of this run are gone" in message
    assert "trained to step 2. Restore the directory, or use its export run/export." in message


@pytest.mark.parametrize(
    ("content", "reason"), [("", "manifest.json is empty"), ("{", "manifest.json is not JSON")]
)
def test_a_damaged_manifest_mentions_the_export(run, content, reason):
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000001")
    for file in run.glob("checkpoints/*/manifest.json"):
        file.write_text(content)
    for words in (COMMANDS[0], ("export", "run")):
        result = flowgrain(*words)
        assert result.status == 1
        assert result.stderr.count(reason) == 1
        assert "(2 checkpoints are damaged)" in result.stderr
        assert result.stderr.endswith("or use its export run/export.\n")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--out", ""),
        ("train", "--out="),
        ("train", "--resume", ""),
        ("sample", "shapes", *PROMPT, "--out", ""),
        ("evaluate", "shapes", "--out", ""),
        ("export", "run", "--out", ""),
        ("compare", "quick", "--out", ""),
        ("train", "--plugin", ""),
    ],
    ids=" ".join,
)
def test_an_empty_option(directory, words):
    assert re.fullmatch(
        r"error: --(\w+)='': is empty. Give a value, or remove --\1.\n", refused(*words)
    )
    assert list(directory.iterdir()) == []


SD3 = ("model.name=sd3", "rewards=['toy:red']", "optimizer.learning_rate=1e-4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", ""), "'': an empty word"),
        (("sample", "", *PROMPT), "'': an empty word"),
        (("train", "data.prompts="), "data.prompts=: is empty. Write data.prompts=VALUE"),
        (("train", "training.max_steps="), "training.max_steps=: is empty."),
        (("train", "data.prompts=''"), "data.prompts='': is empty."),
        (("train", "model.path="), "model.path=: is empty. Write model.path=VALUE"),
        (("train", "g2rpo", *SD3, "model.path=''"), "model.path: model.name=sd3 needs weights."),
        (("train", "--training.max_steps=3"), "write training.max_steps=3 without dashes"),
        (("train", "--training.max_steps", "3"), "write training.max_steps=VALUE without dashes"),
    ],
    ids=str,
)
def test_words_that_are_empty_or_have_dashes(directory, words, message):
    assert message in refused(*words)
    assert list(directory.iterdir()) == []


def test_an_empty_prompt_is_a_prompt(directory):
    assert "is empty" not in flowgrain("sample", "shapes", "--prompt", "").stderr


QUITS = "import sys\n\n\ndef quits(images, prompts):\n    sys.exit(0)\n"


def test_a_reward_that_ends_the_process(directory):
    rewards_file(directory, QUITS, "quitting")
    result = flowgrain("train", "g2rpo", *SMALL, "rewards=['quitting:quits']", "--out", "run")
    assert result.status == 1
    assert f"(SystemExit: 0 ({directory / 'quitting.py'}, line 5))" in result.stderr


def test_a_reward_that_fails_in_an_evaluation_is_one_line(directory, caplog):
    rewards_file(directory, QUITS, "quitting_too")
    words = ("rewards=['quitting_too:quits']", "evaluation.every=1", "--out", "run")
    result = flowgrain("train", "g2rpo", *SMALL, *words)
    assert result.status == 1
    assert result.stderr.count("SystemExit: 0") == 1
    assert caplog.records == []


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "import sys\nsys.exit(3)"])
def test_a_plugin_or_reward_module_that_ends_the_process(directory, text):
    rewards_file(directory, text, f"exits{len(text)}")
    line = rf"SystemExit: \d \({directory}/exits\d+.py, line {text.count(chr(10)) + 1}\)"
    assert re.search(line, refused("train", "--plugin", f"exits{len(text)}.py"))
    assert re.search(line, refused("train", "demo", f"rewards=['exits{len(text)}:x']"))


QUITTING_BACKBONE = """
from flowgrain.models import register_backbone
from toy import Toy

class Quits(Toy):
    def encode(self, texts):
        raise SystemExit(0)

    def velocity(self, *arguments):
        if "late" in __file__:
            raise SystemExit(0)
        return super().velocity(*arguments)

if "late" in __file__:
    Quits.encode = Toy.encode
register_backbone("quits_" + __file__.split("/")[-1][:-3])(Quits)
"""


def test_a_backbone_that_ends_the_process(directory):
    (directory / "early.py").write_text(QUITTING_BACKBONE)
    words = ("model.name=quits_early", "rewards=['toy:red']", "--out", "run")
    result = flowgrain("train", "g2rpo", *SMALL, *words, "--plugin", "early.py")
    assert result.status == 2
    assert "member 'encode' raises SystemExit: 0" in result.stderr


def test_code_of_the_user_that_ends_a_command(directory, monkeypatch):
    from flowgrain import Trainer

    (directory / "ends.py").write_text("def end(*_, **__):\n    raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(directory)
    import ends

    monkeypatch.setattr(Trainer, "train", ends.end)
    result = flowgrain("train", *SMALL)
    assert result.status == 1
    assert f"error: SystemExit: 0 ({directory / 'ends.py'}, line 2)" in result.stderr


SIGNATURES = """
def needs3(images, prompts, extra):
    return images.mean((1, 2, 3))


def one(images):
    return images.mean((1, 2, 3))


def good(images, prompts, extra=1, *, scale: float = 1.0):
    return images.mean((1, 2, 3))


def any_arguments(*arguments):
    return arguments[0].mean((1, 2, 3))


class Needs:
    def __call__(self, images, prompts, extra):
        return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "needs3",
            "needs3(images, prompts, extra) needs the argument 'extra'. A reward is called with "
            "images and prompts only. Make it an option: def needs3(images, prompts, *, extra).",
        ),
        ("one", "one(images) does not take two arguments. A reward is called with"),
        ("Needs", "Needs.__call__(images, prompts, extra) needs the argument 'extra'."),
    ],
)
def test_the_signature_of_a_reward(directory, name, message):
    rewards_file(directory, SIGNATURES, "signed")
    stderr = refused("train", "g2rpo", *SMALL, f"rewards=['signed:{name}']", "--out", "run")
    assert f"rewards[signed:{name}]: {message}" in stderr
    assert not (directory / "run").exists()


def test_signatures_that_fit_or_are_unknown(directory):
    rewards_file(directory, SIGNATURES, "signed")
    build_reward(RewardConfig(name="signed:good", scale=2.0))
    build_reward(RewardConfig(name="signed:any_arguments"))
    assert build_reward(RewardConfig(name="builtins:max")) is max


DEAD = "http://127.0.0.1:9"
DEAD_REWARDS = {
    f"{{name: remote, url: '{DEAD}', reward: pickscore}}": (
        f"rewards[remote].url={DEAD}: no server answers (connection refused). Start it with "
        "flowgrain serve pickscore --port 9, or correct the address."
    ),
    f"{{name: judge, url: '{DEAD}/v1', model: m}}": (
        f"rewards[judge].url={DEAD}/v1: no server answers (connection refused). "
        "Start the server, or correct the address."
    ),
    "{name: remote, url: 'http://127.0.0.1:99999', reward: x}": "no server answers (port out of",
}


@pytest.mark.parametrize(("reward", "message"), DEAD_REWARDS.items())
def test_a_reward_server_that_is_not_there(directory, run, monkeypatch, reward, message):
    monkeypatch.setattr(reachable, "get_environ_proxies", lambda url: {})
    before = sorted(directory.rglob("*"))
    for words in (
        ("train", "g2rpo", *SMALL, f"rewards=[{reward}]", "--out", "new"),
        ("train", "--resume", "run", f"evaluation.rewards=[{reward}]", "training.max_steps=3"),
        ("evaluate", "shapes", f"evaluation.rewards=[{reward}]", "--steps", "1", "--out", "new"),
    ):
        result = flowgrain(*words)
        assert result.status == 2
        assert message in result.stderr
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert sorted(path for path in directory.rglob("*")) == before


YAML_FILES = {
    b"method: {name: g2rpo\nsampling: [": "line 2 is not YAML: expected ',' or '}'.",
    b"- a\n- b\n": "contains a list. Write sections such as training: {max_steps: 40}.",
    b"name: caf\xe9\n": "not UTF-8 text (invalid continuation byte at byte 9). Save it as UTF-8.",
    b"method:\n\tname: g2rpo\n": "line 2 is not YAML: found character that cannot start any token.",
}


@pytest.mark.parametrize(("content", "message"), YAML_FILES.items(), ids=str)
def test_a_file_that_is_not_a_configuration(directory, content, message):
    (directory / "my.yaml").write_bytes(content)
    assert refused("train", "my.yaml").startswith(f"error: my.yaml: {message}")


WORDS = {
    "training.max_steps 3": "'training.max_steps' is not an override. Write training.max_steps=3.",
    "training.max_steps=many": "training.max_steps=many: must be a whole number, such as 40.",
    "training.max_steps=1.5": "training.max_steps=1.5: must be a whole number, such as 40.",
    "training.max_steps=true": "training.max_steps=true: must be a whole number, such as 40.",
    "training.max_steps.x=3": "training.max_steps.x=3: training.max_steps has no parts. Write "
    "training.max_steps=3.\n",
    "sampling.shift.a=3": "sampling.shift.a=3: sampling.shift has no parts.",
    "model.t5=x": "model.t5=x: must be true or false.",
    "training=3": "training=3: is a section. Write training.KEY=VALUE.\n",
    "rewards=[redness]": "rewards[redness]: there is no reward 'redness'.",
    "zzzzz": "There is no recipe, method, file or run 'zzzzz'. Known: demo, a method (g2rpo, ...) "
    "or a file. List them with flowgrain recipes. A custom method needs --plugin FILE.py.\n",
    "runs/nope": "runs/nope: there is no such directory.",
}


@pytest.mark.parametrize(("words", "message"), WORDS.items(), ids=str)
def test_words_that_are_wrong(directory, words, message):
    assert refused("train", *words.split(), "--out", "run").startswith(f"error: {message}")
    assert list(directory.iterdir()) == []


def test_an_unknown_reward_mentions_plugins(directory):
    assert "with --plugin FILE.py." in refused("train", "demo", "rewards=[redness]")


def test_a_file_in_place_of_a_directory(directory):
    (directory / "afile").write_text("x")
    assert refused("train", *SMALL, "--out", "afile") == (
        "error: --out afile: is a file. Give a directory.\n"
    )
    message = "error: afile: not the directory of a run. It is a file.\n"
    assert refused("report", "afile") == message
    assert refused("export", "afile") == message


def test_a_directory_that_is_not_writable(directory, monkeypatch, run):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    (directory / "locked").mkdir()
    assert "locked: is not writable." in refused("train", *SMALL, "--out", "locked")
    monkeypatch.undo()
    monkeypatch.chdir(directory)

    def denied(*_):
        raise PermissionError(13, "Permission denied", "run/.lock")

    monkeypatch.setattr("flowgrain.records.run_lock.RunLock.acquire", denied)
    message = refused("train", "--resume", "run", "training.max_steps=3")
    assert message.startswith("error: run: is not writable (")
    assert "disk space" not in message


def test_temporary_files_have_one_dot(directory, monkeypatch):
    from flowgrain.records import files

    names = []
    monkeypatch.setattr(files, "flush", lambda path: names.append(path.name))
    for name in (".lock.json", "run.yaml"):
        files.write_atomically(directory / name, "x")
    assert all(re.match(r"\.\w", name) for name in names)
    assert len(names) == 2


def test_a_plugin_that_needs_a_missing_module(directory):
    (directory / "needs_more.py").write_text("\nimport not_installed_anywhere\n")
    assert refused("train", "--plugin", "needs_more.py") == (
        "error: plugin needs_more.py: ModuleNotFoundError: No module named "
        f"'not_installed_anywhere' ({directory / 'needs_more.py'}, line 2). Install it.\n"
    )


def test_a_backbone_without_a_member(directory):
    (directory / "partial.py").write_text(
        "from flowgrain.models import register_backbone\nfrom toy import Toy\n"
        "class Partial(Toy):\n    def __init__(self):\n        super().__init__()\n"
        "    @property\n    def lora_targets(self):\n        return self.nothing\n"
        "class Without:\n    @classmethod\n    def load(cls, model, dtypes):\n"
        "        return cls()\n"
        "register_backbone('partial')(Partial)\nregister_backbone('without')(Without)\n"
    )
    words = ("train", "g2rpo", *SMALL, "rewards=['toy:red']", "--plugin", "partial.py")
    message = refused(*words, "model.name=without")
    place = f"backbone Without ({directory / 'partial.py'}): member 'transformer' is missing."
    assert place in message
    assert "has no attribute" not in message
    assert "'nothing'" in refused(*words, "model.name=partial")


def test_control_c_while_a_run_starts(directory, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flowgrain.training.trainer.load_rewards", interrupt)
    result = flowgrain("train", *SMALL, "--out", "run")
    assert result.status == 130
    assert result.stderr == "interrupted before the run started; nothing was written.\n"
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("rate", [1e30, 3e-6])
def test_the_advice_of_a_run_that_diverged(tiny, rate):
    """A third of the rate, at most 1e-4 (bundled model) or the published rate (other models)."""
    config = tiny.with_changes({"optimizer.learning_rate": rate})
    published = config.method.published_learning_rate(lora=False)
    assert published < 1e-4
    for model, limit in (("shapes", 1e-4), ("sd3", published)):
        config = config.with_changes({"model.name": model})
        recorder = SimpleNamespace(given=[])
        trainer = SimpleNamespace(config=config, out=Path("nowhere"), recorder=recorder)
        message = smaller_rate(trainer)
        start = f"Use a smaller learning rate than {rate:g}: flowgrain train --resume nowhere "
        assert message.startswith(f"{start}optimizer.learning_rate=")
        assert float(message.split("=")[-1]) == pytest.approx(min(rate / 3, limit), rel=1e-4)


REPORT = {
    "evaluations/step-000002.json": ("{", "not JSON"),
    "evaluations/images-000002.zip": ("x", "File is not a zip file"),
    "groups/step-000002.zip": ("[]", "File is not a zip file"),
}


@pytest.mark.parametrize(("name", "content"), REPORT.items())
def test_a_report_of_damaged_files_uses_plain_words(run, caplog, name, content):
    (run / name).write_text(content[0])
    succeeded("report", "run")
    messages = [record.getMessage() for record in caplog.records]
    assert f"run/{name} is damaged ({content[1]}). It is left out." in messages

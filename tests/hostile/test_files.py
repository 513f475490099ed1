"""Damaged files: one readable line that names the file, no traceback, nothing written.

Files that a command needs stop it with exit status 2, or 1 for a damaged checkpoint. Files that a
command can do without are reported and left out.
"""

import errno
import io
import json
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from flowgrain.cli import main

LIMIT = 30.0
"""Seconds that a command may take. All take less than a second on an idle machine."""
SMALL = (
    "sampling.num_steps=4",
    "method.group_size=3",
    "training.prompts_per_step=2",
    "training.max_steps=1",
    "evaluation.num_prompts=4",
    "evaluation.num_steps=2",
    "evaluation.rewards=[]",
)
FOLDER = object()
"""A directory in place of the file."""
MISSING = object()
"""No file."""
DEEP = b"[" * 100_000 + b"]" * 100_000
BINARY = bytes(range(256)) * 8
NOT_UTF8 = b'{"prompt": "caf\xe9 and \xff\xfe"}\n'
HUGE = b"9" * 10_000
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 108)
)
"""YAML whose aliases expand to 9^11 values."""

ANY = {
    "binary": BINARY,
    "not_utf8": NOT_UTF8,
    "deep": DEEP,
    "directory": FOLDER,
}
"""Contents that no file may have."""


def command(*words):
    """Exit status and output of a command in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    begin, status = time.monotonic(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["flowgrain", *map(str, words)])
        patch.setenv("COLUMNS", "120")
        try:
            main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    assert time.monotonic() - begin < LIMIT
    assert "Traceback" not in stderr.getvalue()
    return status, stdout.getvalue(), stderr.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        path.unlink()
    if content is FOLDER:
        path.mkdir()
    elif content is not MISSING:
        path.write_bytes(content)


def files_in(folder):
    """Names and contents of all files below `folder`, without Python's caches."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def refused(folder, words, named, status=2):
    """Check that a command ends with one line that contains `named`, and writes nothing."""
    before = files_in(folder)
    found, _, stderr = command(*words)
    assert found == status, stderr
    (line,) = [line for line in stderr.splitlines() if not line.startswith("shapes: ")]
    assert line.startswith("error: ")
    assert named in line
    assert len(line) < 1000
    assert files_in(folder) == before


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Every command runs in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, with evaluations, and an evaluation of it."""
    root = tmp_path_factory.mktemp("hostile")
    changes = ("method.sde_type=calibrated_sde", "method.calibration.samples=4")
    words = ("train", "densegrpo", *SMALL, *changes, "--out", root / "run")
    status, _, stderr = command(*words)
    assert status == 0, stderr
    evaluate = ("evaluate", root / "run", "--steps", "1", "--out", root / "scores", "--images")
    assert command(*evaluate)[0] == 0
    return root


@pytest.fixture
def run(trained, directory):
    """A copy of the run, as a relative path."""
    shutil.copytree(trained / "run", directory / "run")
    return Path("run")


@pytest.fixture
def scores(trained, run, directory):
    """A copy of the evaluation."""
    shutil.copytree(trained / "scores", directory / "scores")
    record = directory / "scores" / "evaluation.yaml"
    record.write_text(record.read_text().replace(str(trained), str(directory)))
    return Path("scores")


PROMPTS = {
    "p.txt": {
        "binary": BINARY,
        "not_utf8": NOT_UTF8,
        "utf16": "one red circle\n".encode("utf-16"),
        "empty": b"",
        "only_newlines": b"\n\n\n",
        "blank_line": b"one red circle\n\none blue square\n",
        "unknown_words": b"one red circle\na photo of a cat\n",
        "directory": FOLDER,
        "missing": MISSING,
        "one_very_long_line": b"red " * 1_000_000,
    },
    "p.jsonl": {
        **ANY,
        "truncated": b'{"prompt": "one red circle"}\n{"prompt": "one re',
        "wrong_type": b'{"prompt": 3}\n',
        "list": b'["one red circle"]\n',
        "huge_number": b'{"prompt": ' + HUGE + b"}\n",
        "lone_surrogate": b'{"prompt": "\\ud800"}\n',
        "empty": b"",
    },
    "p.json": {
        **ANY,
        "truncated": b'["one red circle", "one bl',
        "object": b'{"prompt": "one red circle"}',
        "huge_number": b"[" + HUGE + b"]",
        "numbers": b"[1, 2, 3]",
        "null": b"null",
        "empty_list": b"[]",
    },
    "p.csv": {
        "binary": BINARY,
        "not_utf8": NOT_UTF8,
        "open_quote": b'prompt\n"one red circle\n',
        "no_column": b"a,b\n1,2\n",
        "large_field": b"prompt\n" + b"a" * 200_000 + b"\n",
        "directory": FOLDER,
    },
    "p.parquet": {
        "text": b"one red circle\n",
        "binary": BINARY,
        "truncated": b"PAR1" + b"\0" * 100,
        "wrong_footer": b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1",
        "empty": b"",
        "directory": FOLDER,
    },
}


def cases(table):
    """Test parameters for a table of contents by file."""
    return [
        pytest.param(name, content, id=f"{Path(name).name}-{kind}")
        for name, contents in table.items()
        for kind, content in contents.items()
    ]


@pytest.mark.parametrize(("name", "content"), cases(PROMPTS))
def test_prompts(directory, name, content):
    write(directory / name, content)
    refused(directory, ("train", "g2rpo", *SMALL, f"data.prompts={name}", "--out", "run"), name)


YAML = {
    "recipe.yaml": {
        **ANY,
        "truncated": b"method: {name: g2rpo\nsampling: [",
        "list": b"- method\n- name\n",
        "number": b"3\n",
        "keys": b"1: {2: 3}\n",
        "huge_number": b"method: {name: g2rpo, group_size: " + HUGE + b"}\n",
        "aliases": BOMB,
        "alias_of_itself": b"a: &a [*a]\n",
        "tag": b"method: !!python/object/apply:os.system ['touch written']\n",
        "control_characters": b"method: {name: \x00\x07}\n",
        "tabs": b"method:\n\tname: g2rpo\n",
    }
}


@pytest.mark.parametrize(("name", "content"), cases(YAML))
@pytest.mark.parametrize("words", [("config", "show"), ("train",), ("doctor",)])
def test_settings_files(directory, words, name, content):
    write(directory / name, content)
    refused(directory, (*words, name), name)


@pytest.mark.parametrize(("name", "content"), cases({"comparison.yaml": YAML["recipe.yaml"]}))
def test_comparison_files(directory, name, content):
    write(directory / "mine.yaml", content)
    refused(directory, ("compare", "mine.yaml", "--dry-run"), "mine.yaml")
    write(directory / "comparisons" / name, content)
    if content is not FOLDER:
        refused(directory, ("report", "comparisons"), "comparison.yaml")


PLUGINS = {
    "plugin.py": {
        **ANY,
        "nul": b"a = 1\0\n",
        "syntax": b"def f(:\n",
        "raises": b"1 / 0\n",
        "exits": b"raise SystemExit(0)\n",
        "recursion": b"def f():\n    f()\nf()\n",
        "missing": MISSING,
        "wrong_method": b"from flowgrain import register\nregister(3)\n",
    }
}


@pytest.mark.parametrize(("name", "content"), cases(PLUGINS))
def test_plugins(directory, name, content):
    write(directory / name, content)
    refused(directory, ("train", "g2rpo", "--plugin", name, *SMALL), name)


RUN_FILE = {
    "run.yaml": {
        **ANY,
        "truncated": b"config: {method: {name: g2",
        "empty": b"",
        "list": b"- config\n",
        "no_settings": b"given: []\n",
        "settings_of_wrong_type": b"config: [1, 2]\ngiven: []\n",
        "aliases": BOMB,
    }
}


@pytest.mark.parametrize(("name", "content"), cases(RUN_FILE))
@pytest.mark.parametrize(
    "words",
    [("report", "run"), ("train", "--resume", "run"), ("evaluate", "run"), ("export", "run")],
    ids=lambda words: words[0],
)
def test_the_settings_of_a_run(directory, run, words, name, content):
    write(run / name, content)
    refused(directory, words, name)


CHECKPOINT = {
    "manifest.json": {
        **ANY,
        "truncated": b'{"step": 1, "state": {"st',
        "empty": b"",
        "list": b"[1, 2]",
        "no_state": b'{"step": 1, "sha256": {}, "score": 1}',
        "empty_state": b'{"step": 1, "sha256": {}, "score": 1e999, "state": {}}',
        "checksums_of_wrong_type": b'{"step": 1, "sha256": [1], "state": {}}',
        "other_path": b'{"step": 1, "sha256": {"/dev/null/x": "0"}, "state": {}}',
        "missing": MISSING,
    },
    "shard-00001-model-00001-of-00001.safetensors": {
        "truncated": b"\x10",
        "binary": BINARY,
        "missing": MISSING,
        "directory": FOLDER,
    },
}


@pytest.mark.parametrize(("name", "content"), cases(CHECKPOINT))
@pytest.mark.parametrize("words", [("evaluate", "run"), ("export", "run")], ids=lambda w: w[0])
def test_checkpoints(directory, run, words, name, content):
    file = run / "checkpoints" / "step-000001" / name
    assert file.exists()
    write(file, content)
    refused(directory, words, "step-000001", status=1)


RECORDS = {
    "evaluations/step-000001.json": {
        **ANY,
        "truncated": b'{"step": 1, "num_steps": 4, "prompts": ["one re',
        "empty": b"",
        "list": b"[]",
        "wrong_types": b'{"step": "x", "num_steps": 4, "prompts": 3, "scores": [], "parts": 1}',
        "other_lengths": b'{"step": 1, "num_steps": 4, "prompts": ["a"], "scores": '
        b'{"oracle": [1, 2]}, "parts": {}}',
        "huge_number": b'{"step": ' + HUGE + b"}",
        "nothing": b"null",
    },
    "evaluations/images-000001.zip": {
        "binary": BINARY,
        "empty": b"",
        "directory": FOLDER,
        "header": b"PK\x03\x04" + b"\0" * 50,
    },
    "groups/step-000001.zip": {
        **ANY,
        "truncated": b"PK\x03\x04",
        "empty": b"",
        "nothing": b"PK\x05\x06" + b"\0" * 18,
    },
    "calibration.json": {
        **ANY,
        "truncated": b'{"psi": [1, ',
        "wrong_types": b'{"psi": "a", "rounds": [{}]}',
        "no_rounds": b'{"psi": [1.0], "rounds": []}',
    },
    "metrics.jsonl": {
        "not_utf8": b'{"step": 1, "los\xff": 1}\n',
        "binary": BINARY,
        "deep": DEEP + b"\n",
        "list": b"[1, 2]\n",
        "no_step": b'{"loss": 1}\n',
        "huge_number": b'{"step": ' + HUGE + b"}\n",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), cases(RECORDS))
def test_the_report_leaves_damaged_records_out(directory, run, caplog, name, content):
    write(run / name, content)
    (run / "report.html").unlink()
    before = files_in(directory)
    status, stdout, stderr = command("report", "run")
    assert (status, stdout) == (0, "wrote run/report.html\n"), stderr
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert name in lines[0]
    assert "\n" not in lines[0]
    after = files_in(directory)
    assert after.pop("run/report.html") is not None
    assert after == before


SCORES = {
    "scores/damaged.parquet": {
        "binary": BINARY,
        "empty": b"",
        "text": b"scores\n",
        "directory": FOLDER,
        "truncated": b"PAR1" + b"\0" * 100,
    }
}


def other_columns():
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"model": [1, 2], "oracle": ["a", "b"]}), file)
    return file.getvalue()


SCORES["scores/damaged.parquet"]["other_columns"] = other_columns()


@pytest.mark.parametrize(("name", "content"), cases(SCORES))
@pytest.mark.parametrize("own", [True, False])
def test_damaged_scores_do_not_stop_an_evaluation(directory, scores, caplog, name, content, own):
    """Own scores are computed again. Scores of another model are left out."""
    file = next((scores / "scores").rglob("*.parquet"))
    if not own:
        file = scores / "scores" / "other" / file.name
    expected = json.loads((scores / "table.json").read_text())
    write(file, content)
    words = ("evaluate", "run", "--steps", "1", "--out", "scores", "--images", "--json")
    status, stdout, stderr = command(*words)
    assert status == 0, stderr
    assert json.loads(stdout) == expected
    assert any(str(file) in record.getMessage() for record in caplog.records)


RECORD = {
    "evaluation.yaml": {
        **ANY,
        "truncated": b"models: {run: [",
        "empty": b"",
        "no_models": b"metrics: []\n",
        "only_models": b"models: {}\n",
        "aliases": BOMB,
    }
}


@pytest.mark.parametrize(("name", "content"), cases(RECORD))
def test_the_record_of_an_evaluation(directory, scores, name, content):
    write(scores / name, content)
    refused(directory, ("evaluate", "run", "--steps", "1", "--out", "scores"), name)


RESULTS = {
    "result.json": {
        **ANY,
        "truncated": b'{"label": "g2r',
        "empty": b"",
        "wrong_types": b'{"label": 1, "steps": []}',
        "other_steps": b'{"label": "a", "reward_set": "b", "seed": 0, "stopped": null, '
        b'"prompts": [], "steps": {}}',
    }
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), cases(RESULTS))
def test_results_of_a_comparison(directory, name, content, caplog):
    status, stdout, _ = command("compare", "quick", "--dry-run", "--json")
    assert status == 0
    first = json.loads(stdout)["runs"][0]["name"]
    from flowgrain.studies.comparison import load_comparison
    from flowgrain.studies.run import _claim

    _claim(load_comparison("quick"), directory / "c")
    write(directory / "c" / "runs" / first / name, content)
    status, _, stderr = command("report", "c")
    assert status == 2
    assert "c: no run of this comparison is finished" in stderr
    if content is not RESULTS[name]["other_steps"]:
        assert "result.json is damaged" in caplog.text


OUTPUTS = {
    "train": ("train", "g2rpo", *SMALL, "--out", "OUT"),
    "evaluate": ("evaluate", "shapes", "evaluation.num_prompts=2", "--steps", "1", "--out", "OUT"),
    "evaluate_images": ("evaluate", "shapes", "--images", "--steps", "1", "--out", "OUT"),
    "sample": ("sample", "shapes", "--prompt", "one red circle", "--steps", "1", "--out", "OUT"),
    "export": ("export", "run", "--out", "OUT"),
    "compare": ("compare", "quick", "--jobs", "1", "--out", "OUT"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_below_a_file(directory, run, name):
    (directory / "file").write_text("")
    words = [word.replace("OUT", "file/out.png") for word in OUTPUTS[name]]
    refused(directory, words, "--out file/out.png")


@pytest.fixture
def read_only(monkeypatch, directory):
    """Every attempt to write below `directory` fails, as on a read-only file system."""

    def guarded(function, opens=False):
        def call(path, *rest, **options):
            mode = rest[0] if rest else options.get("mode", "r")
            reads = opens and not set(mode) & set("wax+")
            inside = isinstance(path, str | Path) and directory in Path(path).absolute().parents
            if inside and not reads:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *rest, **options)

        return call

    for name in ("mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    monkeypatch.setattr(io, "open", guarded(io.open, opens=True))
    monkeypatch.setattr("builtins.open", io.open)
    return directory


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_on_a_read_only_file_system(run, read_only, name):
    words = [word.replace("OUT", "out.png") for word in OUTPUTS[name]]
    refused(read_only, words, "--out out.png")


def test_a_report_on_a_read_only_file_system(run, read_only):
    refused(read_only, ("report", "run"), "the report of run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p.txt", ("train", "g2rpo", *SMALL, "data.prompts=p.txt")),
        ("p.jsonl", ("train", "g2rpo", *SMALL, "data.prompts=p.jsonl")),
        ("p.json", ("train", "g2rpo", *SMALL, "data.prompts=p.json")),
        ("my.yaml", ("train", "my.yaml")),
        ("my.yaml", ("compare", "my.yaml")),
        ("plugin.py", ("train", "g2rpo", "--plugin", "plugin.py")),
        ("run/run.yaml", ("report", "run")),
    ],
)
def test_no_permission(directory, monkeypatch, name, words):
    write(directory / name, b"one red circle\n")
    original = io.open

    def denied(path, *rest, **options):
        if isinstance(path, str | Path) and Path(path).absolute() == directory / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *rest, **options)

    before = files_in(directory)
    monkeypatch.setattr(io, "open", denied)
    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr(io, "open_code", denied)
    status, _, stderr = command(*words)
    monkeypatch.undo()
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert Path(name).name in stderr
    assert "ermission" in stderr
    assert files_in(directory) == before

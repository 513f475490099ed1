"""Bad settings: exit status 2, one line that names the setting, no traceback, and nothing written.

Time and memory are bounded, because no wrong setting may allocate what it describes.
"""

import os
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from command_line import SMALL, flowgrain

from flowgrain import SettingsError, Trainer, load_config
from flowgrain.settings import SettingsWarning
from flowgrain.training import fit, sizes
from flowgrain.training.disk import run_bytes

SECONDS = 10
"""A refusal may take this long, with the import of the libraries and on a busy machine."""
MEGABYTES = 400
"""A refusal may need this much memory, with the bundled model."""

HUGE = "100000000000000"
DEEP = "[" * 200 + "]" * 200

# One override, whose setting the message has to name.
REFUSED = [
    # the names of the report: each exhausted the memory or was accepted in silence
    *(f"training.prompts_per_step={n}" for n in ("1000000000000", "1000001", "1000000", "1e12")),
    *(f"method.group_size={n}" for n in ("1000000000", "10001", "10000", "5000", "1", "0", "-3")),
    *(f"lora.rank={n}" for n in ("1000000", "4097", "-1", "1.5", "big", "null")),
    *(f"evaluation.num_steps={n}" for n in ("1000000000", "1001", "0", "-1", HUGE)),
    *(f"runtime.threads={n}" for n in ("100000", "1025", "-1", "0.5", "all")),
    *(f"evaluation.num_prompts={n}" for n in (HUGE, "1000001", "0", "-5", "[1]")),
    *(f"runtime.seed={n}" for n in ("9223372036854775808", "-1", "1e400", "0.5", "9" * 400, "x")),
    # numbers of steps, rows, prompts and pixels
    *(f"sampling.num_steps={n}" for n in ("1", "0", "1001", HUGE, "3.0", "'8'", "true", "null")),
    *(f"sampling.batch_size={n}" for n in ("0", "-1", HUGE, "1.5")),
    *(f"sampling.prompts_per_chunk={n}" for n in ("0", HUGE, "x")),
    *(f"training.max_steps={n}" for n in ("0", "-1", HUGE, "1e3", "[1]")),
    *(f"training.max_seconds={n}" for n in ("0", "-1", ".inf", ".nan", "1e300")),
    *(f"training.micro_batch_size={n}" for n in ("0", HUGE)),
    *(
        f"training.graph_memory={n}"
        for n in ("-1", "1e6", ".nan", ".inf", HUGE, "any", "true", "null")
    ),
    *(f"training.ema_decay={n}" for n in ("1", "-0.1", "1.5", ".nan")),
    *(f"training.ema_every={n}" for n in ("0", HUGE)),
    *(f"training.max_failed_rewards={n}" for n in ("-0.1", "1.1", ".nan")),
    *(f"training.checkpoint_every={n}" for n in ("-1", HUGE)),
    *(f"training.keep_checkpoints={n}" for n in ("0", HUGE)),
    *(f"evaluation.every={n}" for n in ("-1", HUGE, "always")),
    *(f"evaluation.guidance_scale={n}" for n in ("-1", "1e12", ".inf")),
    *(f"model.height={n}" for n in ("4", "0", "-8", HUGE)),
    *(f"model.width={n}" for n in ("4", HUGE)),
    *(f"model.max_prompt_tokens={n}" for n in ("0", HUGE)),
    # numbers that are accepted nowhere, or that have no meaning
    *(f"sampling.shift={n}" for n in ("0", "-1", "1e12", "1001", ".nan", ".inf", "automatic")),
    *(f"sampling.shift_terminal={n}" for n in ("0", "1", "-0.5", "2")),
    *(f"sampling.sigma_min={n}" for n in ("0", "1", "-1", "0.9999999999")),
    *(f"sampling.guidance_scale={n}" for n in ("-1", "1e12", "1001", ".nan")),
    *(f"method.eta={n}" for n in ("0", "-1", "1e12", "1e300", "1e-300", ".nan", "101")),
    *(f"method.kl_weight={n}" for n in ("-1", "1e30", ".inf")),
    *(f"method.clip_range={n}" for n in ("0", "-1", "1e30")),
    *(f"method.advantage_clip={n}" for n in ("0", "1e30")),
    *(f"method.std_epsilon={n}" for n in ("0", "-1", "1e30")),
    *(f"method.updates_per_rollout={n}" for n in ("0", "-1", "10001", HUGE, "all", "1.5")),
    *(f"method.best_of={n}" for n in ("3", "-2", HUGE)),
    *(f"optimizer.learning_rate={n}" for n in ("0", "-1", ".nan", ".inf", "1e400", "fast")),
    *(f"optimizer.weight_decay={n}" for n in ("-1", "1e30")),
    *(f"optimizer.max_grad_norm={n}" for n in ("0", "-1", "1e-300", "1e300", ".nan")),
    *(f"optimizer.max_skipped_updates={n}" for n in ("0", HUGE)),
    *(f"optimizer.betas={n}" for n in ("[1,0.9]", "[0.9,1]", "[-1,0.5]", "[0.9]", "0.9", "[]")),
    # lists and steps of the method
    *(f"method.granularities={n}" for n in ("[]", "[0]", "[1,1]", "[-1]", "[100]", "1", "[x]")),
    *(f"method.sde_steps={n}" for n in ("[]", "[-1]", "[7]", f"[{HUGE}]", "[1,1]")),
    "method.psi=[0.1]",
    "method.calibration={samples: 1000}",
    # choices and types
    *(f"runtime.device={n}" for n in ("tpu", "cuda:0", "1", DEEP)),
    *(f"runtime.dtype={n}" for n in ("int8", "16")),
    *(f"runtime.trackers={n}" for n in ("wandb", "[x]", "[nothing]")),
    "runtime.compile=yes",
    "runtime.rollout_weights=1",
    *(f"runtime.context_parallel={n}" for n in ("0", "65", "ring")),
    *(f"sampling.tail_cache={n}" for n in ("taylorseer:1", "first_block:2", "x" * 5000)),
    "sampling.tail_weights=int4",
    "sampling.grid=wavy",
    "method.sde_type=white",
    "method.tail_order=3",
    "method.reward_mix=mix",
    "method.std_unbiased=1",
    "model.t5=1",
    "lora.target_modules=[]",
    "lora.alpha=0",
    "lora.alpha=1e300",
    *(f"name={n}" for n in ("''", "a b", "../up", "/tmp/x", "x" * 300, "[1]", "-flag")),
    # files
    *(f"data.prompts={n}" for n in ("/tmp", "nothing.txt", "/dev/null", "x" * 5000, "~nobody9/x")),
    *(f"data.eval_prompts={n}" for n in ("/tmp", "nothing.txt", "''")),
    'data.prompts="two\\nlines"',
    "model.path=nothing",
    "model.name=nothing",
    "sampling=4",
    "training=[]",
    "nothing.at.all=1",
    "lora.rang=4",
]
# Rewards, and combinations of settings: the words, and a part of the message.
REWARDS = {
    "[':1']": "rewards[:1]: not the name of a reward",
    "['1:']": "rewards[1:]: not the name of a reward",
    "['a b:c']": "rewards[a b:c]: not the name of a reward",
    "['os:']": "rewards[os:]: not the name of a reward",
    "['os:nothing']": "rewards[os:nothing]: cannot be imported",
    "['os:sep']": "rewards[os:sep]: an object of type str is not callable",
    "[]": "rewards=[]: must not be empty. Write for example rewards=[clip].",
    "oracle": "Write rewards=[oracle]",
    "[foo]": "there is no reward 'foo'. Known: oracle",
    "[orakle]": "Did you mean 'oracle'?",
    "[oracle,oracle]": "contains 'oracle' twice",
    "[1]": "rewards.0=1: is not a reward. Write a name, or {name: NAME, weight: 0.5}.",
    "[{weight: 1}]": "rewards.0.name: required",
    "[{name: oracle, weight: 0}]": "rewards[oracle].weight=0: the reward would have no effect",
    "[{name: oracle, weight: 1e-300}]": "rewards[oracle].weight=1e-300: the reward would",
    "[{name: oracle, weight: .nan}]": "rewards[oracle].weight=nan: must be a finite number",
    "[{name: oracle, weight: .inf}]": "rewards[oracle].weight=inf: must be a finite number",
    "[{name: oracle, weight: 1e300}]": "rewards[oracle].weight=1e+300: must be less than",
    "[{name: oracle, weight: -1e300}]": "rewards[oracle].weight=-1e+300: must be greater than",
    "[{name: oracle, weight: heavy}]": "rewards[oracle].weight=heavy: must be a number.",
    "[{name: oracle, batch_size: 0}]": "rewards[oracle].batch_size=0",
    "[{name: oracle, batch_size: 1000000000}]": "rewards[oracle].batch_size=1000000000",
    "[{name: oracle, device: 'cuda:9'}]": "rewards[oracle].device='cuda:9': unknown option",
    "[{name: clip, device: 'cuda:9'}]": "rewards[clip].device=cuda:9",
    "[{name: clip, device: abacus}]": "rewards[clip].device=abacus: unknown device",
}
COMBINATIONS = {
    "mixgrpo method.window_size=30": "method.window_size=30",
    "mixgrpo method.window_size=100000": "method.window_size=100000",
    "mixgrpo method.window_stride=0": "method.window_stride=0",
    "mixgrpo method.window_interval=100000000000": "method.window_interval=100000000000",
    "branchgrpo method.split_fan=1000000000": "method.split_fan=1000000000",
    "branchgrpo method.split_fan=1000 method.group_size=9999": "method.group_size=9999",
    "tempflow_grpo method.seeds=1000000000": "method.seeds=1000000000",
    "tempflow_grpo sampling.num_steps=900": "sampling.num_steps=900: the tree of one prompt has",
    "densegrpo sampling.num_steps=1000": "sampling.num_steps=1000: the tree of one prompt has",
    "densegrpo method.calibration.samples=1000000": "method.calibration.samples=1000000: the im",
    "densegrpo method.calibration.rounds=1000000000": "method.calibration.rounds=1000000000",
    "flow_grpo method.group_size=9000": "method.group_size=9000: the tree of one prompt has",
    "flow_grpo method.group_size=4000 training.prompts_per_step=500000": "prompts_per_step=500000",
    "flow_grpo sampling.num_steps=1000 method.group_size=100": "sampling.num_steps=1000",
    "flow_grpo sampling.shift=1e-30": "sampling.shift=1e-30: with sampling.num_steps=10, two noise",
    "flow_grpo method.sde_type=cps method.eta=2": "method.eta=2.0",
    "flow_grpo method.sde_type=dance_sde method.eta=1e-200": "method.eta=1e-200: the noise of grid",
    "dancegrpo method.timestep_fraction=0": "method.timestep_fraction=0",
    "diffusionnft method.beta=1e30": "method.beta=1e+30",
    "diffusionnft method.decay_rate=2": "method.decay_rate=2",
    "diffusionnft method.updates_per_rollout=per_step": "method.updates_per_rollout=per_step",
    "flow_grpo model.name=zimage rewards=[clip] runtime.compile=inductor": "runtime.compile",
    "g2rpo runtime.trackers=[wandb]": "runtime.trackers: wandb is not installed",
    "g2rpo sampling.grid=model sampling.shift=3": "sampling.shift=3",
}
CASES = [
    *((["demo", word], word.partition("=")[0]) for word in REFUSED),
    *((["demo", f"rewards={value}"], message) for value, message in REWARDS.items()),
    *((words.split(), message) for words, message in COMBINATIONS.items()),
]


def test_there_are_many_different_cases():
    assert len(CASES) >= 150
    assert max(Counter(" ".join(words) for words, _ in CASES).values()) == 1


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@pytest.fixture(scope="module")
def loaded():
    """A first command imports the libraries, which takes seconds and memory."""
    assert flowgrain("plan", "demo").status == 0
    Trainer(load_config("demo"))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    return tmp_path


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("words", "message"), CASES, ids=lambda value: str(value)[:60])
def test_a_bad_setting_is_one_line(directory, words, message):
    begin, before = time.perf_counter(), peak_megabytes()
    result = flowgrain("train", *words, "--out", "run")
    assert result.status == 2, (result.status, result.stdout[:500], result.stderr[:2000])
    assert time.perf_counter() - begin < SECONDS
    assert peak_megabytes() - before < MEGABYTES
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 2000
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert list(directory.iterdir()) == []


def test_a_directory_is_called_a_directory(directory):
    message = flowgrain("train", "demo", "data.prompts=/tmp").stderr
    assert message == ("error: data.prompts=/tmp: is a directory. Give the path of a text file.\n")


def test_a_message_about_memory_gives_both_sizes_and_a_limit(directory):
    message = flowgrain("train", "demo", "training.prompts_per_step=1000000").stderr
    assert "training.prompts_per_step=1000000: the images of a step need " in message
    assert " TB of memory, but this machine has " in message
    assert "Use at most about " in message


def test_a_cache_that_cannot_be_written(directory):
    words = ("g2rpo", "model.name=sd3", "model.path=nothing", "rewards=[oracle]")
    result = flowgrain("train", *words, "model.embedding_cache=/proc/nothing/here")
    assert result.status == 2
    assert "model.embedding_cache=/proc/nothing/here: " in result.stderr


def test_a_disk_that_is_too_small(directory, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    result = flowgrain("train", "demo", *SMALL, "--out", "run")
    assert result.status == 2
    assert "training.keep_checkpoints=2: the run needs " in result.stderr
    assert list(directory.iterdir()) == []


def test_a_resumed_run_uses_the_space_of_its_own_checkpoints(tmp_path, monkeypatch):
    config = load_config("demo")
    size = sizes.size_before_loading(config)
    needed = int(sum(run_bytes(config, size).values()))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 100}))
    with pytest.raises(SettingsError, match="the run needs"):
        fit.check_disk(config, size, tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "tensors").write_bytes(bytes(100))
    fit.check_disk(config, size, tmp_path)


def test_a_directory_that_cannot_be_created_is_named(directory):
    result = flowgrain("train", "demo", *SMALL, "--out", "/proc/q")
    assert result.status == 2
    assert "--out /proc/q: cannot be created" in result.stderr


def test_python_is_refused_in_the_same_way(directory, monkeypatch):
    monkeypatch.setattr(fit, "machine_memory", lambda: 4e9)
    with pytest.raises(SettingsError, match=r"evaluation\.num_prompts=1000000: the images of an"):
        Trainer(load_config("demo", {"evaluation.num_prompts": 1_000_000, "evaluation.every": 5}))
    with pytest.raises(SettingsError, match=r"runtime\.seed=.*must be less than"):
        load_config("demo", {"runtime.seed": 10**5000})
    assert list(directory.iterdir()) == []


WARNINGS = {
    "rewards=[{name: oracle, weight: -1}]": "rewards[oracle].weight=-1: the weight is negative",
    "optimizer.betas=[0,0]": "optimizer.betas=[0.0, 0.0]: AdamW keeps no averages",
    "optimizer.learning_rate=5": "optimizer.learning_rate=5: very high",
    "method.updates_per_rollout=5000": "method.updates_per_rollout=5000: with training.prompts_per",
    "model.attention_backend=foo": "model.attention_backend=foo: has no effect with model.name=sha",
    "model.embedding_cache=/proc/x": "model.embedding_cache=/proc/x: has no effect with model.name",
    "model.height=64": "model.height=64: has no effect with model.name=shapes",
    "runtime.threads=1000": "runtime.threads=1000: more threads than the ",
}


@pytest.mark.parametrize(("word", "message"), WARNINGS.items())
def test_a_surprising_setting_is_one_warning(directory, word, message):
    result = flowgrain("plan", "demo", word)
    assert result.status == 0
    assert result.stderr.startswith(f"warning: {message}")
    assert result.stderr.count("\n") == 1


def test_a_warning_is_shown_once_and_by_the_module_warnings_in_python(directory):
    words = ("demo", *SMALL, "training.max_steps=1", "optimizer.betas=[0,0]")
    result = flowgrain("train", *words, "--out", "run")
    assert result.status == 0
    assert result.stderr.count("optimizer.betas") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(SettingsWarning, match=r"optimizer\.betas=\[0\.0, 0\.0\]"):
            Trainer(load_config("demo", {"optimizer.betas": [0, 0]}))
    assert load_config("demo").warnings() == []


def test_the_largest_seed_trains(directory):
    result = flowgrain("train", "demo", *SMALL, f"runtime.seed={2**63 - 1}", "--out", "run")
    assert result.status == 0, result.stderr


LIMITED = [
    "training.prompts_per_step=1000000",
    "method.group_size=9999",
    "evaluation.num_prompts=1000000",
    "lora.rank=1000000",
    "runtime.threads=100000",
]


@pytest.mark.slow
@pytest.mark.parametrize("word", LIMITED)
def test_a_process_with_little_memory_refuses(tmp_path, word):
    """The process may only have 6 GB of addresses, of which libraries take about 4."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    source = Path(__file__).parents[2] / "src"
    result = subprocess.run(
        [sys.executable, "-m", "flowgrain", "train", "demo", word, "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {word.partition('=')[0]}={word.partition('=')[2]}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

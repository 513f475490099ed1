"""The loop: bad input, broken rewards, LoRA, reference, guidance, exports, one's own reward."""

import functools
import math
import sys
import threading
import types

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from flowgrain.training import checkpoint
from flowgrain import Run, RunStopped, SettingsError, recipe
from flowgrain.models.shapes import WEIGHTS, ShapesBackbone
from flowgrain.data import read_prompts
from flowgrain.rewards import Scoring, score
from flowgrain.config.schema import settings


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"granularity": 1}, "did you mean 'granularities'"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"sde_steps": "0,15"}, "0 to 14 are possible"),
        ({"sde_steps": ""}, "must not be empty"),
        ({"granularities": "0"}, "granularities=0"),
        ({"rewards": "oracle:1,oracle:0.5"}, "names oracle twice"),
        ({"reward_models": "clip=a,clip=b"}, "names clip twice"),
        ({"group_size": 1}, "group_size=1"),
        ({"method": "grpo"}, "did you mean 'g2rpo'"),
        ({"updates_per_rollout": 0}, "updates_per_rollout=0"),
        ({"method": "flow_grpo", "granularities": "1,2"}, "use method=g2rpo"),
    ],
)
def test_settings_that_cannot_be(bad, message):
    with pytest.raises(SettingsError, match=message):
        settings(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("red circle and blue square\n\ntwo red circles\n", "line 2 is blank"),
        ("a cat\n", "cannot read the prompt"),
        ("red circle left of blue square and more\n", "8 words"),
    ],
)
def test_prompt_files_that_cannot_be(tiny, tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        Run(tiny.model_copy(update={"prompts": str(path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "two red circles", "tag": 1}\n{"prompt": "three green circles"}\n'),
        ("a.csv", 'id,caption\n1,"two red circles"\n2,three green circles\n'),
        ("a.json", '["two red circles", {"text": "three green circles", "n": 2}]'),
        ("a.txt", "\ufefftwo red circles\r\nthree green circles"),
    ],
)
def test_prompt_files_of_all_kinds(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts("prompts", str(tmp_path / name)) == ["two red circles", "three green circles"]


def test_columns_stay_with_their_prompts(tmp_path):
    """Of a Parquet file with repeats, unicode and lists, through a step's choice and into the reward."""
    import pyarrow
    from pyarrow import parquet

    from flowgrain.data import prompts_of_step
    from flowgrain.rewards import fields_of, score

    rows = [{"caption": "naïve café 猫\u2028two", "tag": "a", "include": [{"class": "cat"}]}, {"caption": "x", "tag": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[1]]), tmp_path / "a.parquet")
    found = read_prompts("prompts", str(tmp_path / "a.parquet"))
    assert found == ["naïve café 猫\u2028two", "x", "x"]
    assert fields_of(found[0]) == {"tag": "a", "include": [{"class": "cat"}]}

    def by_tag(images, prompts):
        return [ord(fields_of(prompt)["tag"]) for prompt in prompts]

    chosen = prompts_of_step(found, 1, 3, 0)
    assert sorted(score(by_tag, torch.zeros(3, 3, 2, 2), chosen).values.tolist()) == [97, 98, 98]
    assert fields_of("a bare text") == {}


def test_many_prompts_are_read_and_checked_at_once(tmp_path):
    """100,000 of them in one pass each: what is counted is calls, not seconds."""
    from flowgrain.data import prompts_of_step

    (tmp_path / "a.txt").write_text("\n".join(f"prompt number {i}" for i in range(100_000)))
    found = read_prompts("prompts", str(tmp_path / "a.txt"))
    assert len(set(found)) == 100_000
    first = prompts_of_step(found, 1, 24, 0)
    assert len(set(first) | set(prompts_of_step(found, 2, 24, 0))) == 48


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{prompt}\n', "line 2 is no JSON"),
        ("a.json", '{"prompt": "x"}', "holds no list"),
        ("a.parquet", "prompt\n", "is no Parquet file"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 has no field `prompt`"),
        ("a.csv", "id,words\n1,x\n", "line 2 has no field `prompt`"),
        ("a.csv", "prompt\nx\n  \n", "line 3 is blank"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_prompts("prompts", str(tmp_path / name))


def test_names_that_lead_nowhere(tiny):
    with pytest.raises(SettingsError, match="did you mean 'oracle'"):
        Run(tiny.model_copy(update={"rewards": {"oracel": 1.0}}))
    with pytest.raises(SettingsError, match="did you mean 'demo'"):
        recipe("dmo")


def raising(images, prompts):
    raise OSError("server gone")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raising, "server gone"),
        (lambda images, prompts: [math.nan] * len(images), "NaN"),
        (lambda images, prompts: [1.0], "one number an image"),
        (lambda images, prompts: "good", "no list of numbers"),
    ],
)
def test_a_broken_reward_stops_the_run_with_a_checkpoint(tiny, tmp_path, reward, reason):
    run = Run(tiny, tmp_path, rewards={"mine": reward})
    before = {name: p.clone() for name, p in run.policy.trained.items()}
    with pytest.raises(RunStopped, match=reason):
        run.train()
    assert checkpoint.checkpoints(tmp_path / "checkpoints")
    # every sample was masked, so all advantages were 0: only weight decay may have moved the weights
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in run.policy.trained.items())


def test_a_reward_by_its_path(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    s = settings({**tiny.model_dump(), "rewards": "my_rewards:bright:2"})
    assert s.rewards == {"my_rewards:bright": 2.0}
    assert 0 < Run(s, tmp_path / "run").step(1)["reward/my_rewards:bright"] < 1
    for name, message in (("my_rewards:number", "cannot be called"), ("my_rewards:none", "cannot be loaded")):
        with pytest.raises(SettingsError, match=message):
            Run(settings({**tiny.model_dump(), "rewards": name}))


def test_a_broken_image_gets_no_score():
    images = torch.rand(3, 3, 32, 32)
    images[1, 0, 0, 0] = torch.nan
    found = score(lambda images, prompts: [1.0] * len(images), images, ["a"] * 3)
    assert found.values.isnan().tolist() == [False, True, False]
    assert found.failed == 1


def test_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Run(settings({**tiny.model_dump(), "loggers": "tensorboard"}), tmp_path).train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward/oracle")] == [1, 2]


def test_wandb_gets_every_line(tiny, tmp_path, monkeypatch):
    """Against a stand-in of the two calls that are made; the library itself is no dependency."""
    logged, begun = [], {}
    run = types.SimpleNamespace(log=lambda line, step: logged.append((step, line["loss"])))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: begun.update(how) or run))
    Run(settings({**tiny.model_dump(), "loggers": "wandb"}), tmp_path).train()
    assert [step for step, _ in logged] == [1, 2]
    assert begun["config"]["num_steps"] == 4


def test_a_logger_that_is_missing_is_named_before_the_run_begins(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="pip install wandb"):
        Run(settings({**tiny.model_dump(), "loggers": "wandb"}), tmp_path).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_rewards_in_the_background(tiny, tmp_path):
    """The first part's reward waits for the second part to be decoded, which in line would never be; the numbers are the same."""
    second = threading.Event()
    waited = []

    def patient(images, prompts):
        if not waited:
            waited.append(second.wait(20))
        return images.mean((1, 2, 3)).tolist()

    def plain(images, prompts):
        return images.mean((1, 2, 3)).tolist()

    s = tiny.model_copy(update={"prompts_per_step": 3})
    whole = Run(s, tmp_path / "a", rewards={"mine": plain, "other": red_less}).sample_tree(1)
    run = Run(s.model_copy(update={"prompts_per_rollout": 2}), tmp_path / "b", rewards={"mine": patient, "other": red_less})
    decode, decoded = run.backbone.decode, []

    def telling(latents):
        decoded.append(len(latents))
        if sum(decoded) > len(whole.images) * 2 // 3:
            second.set()
        return decode(latents)

    run.backbone.decode = telling
    parts = run.sample_tree(1)
    assert waited == [True]
    torch.testing.assert_close(parts.images, whole.images, atol=1e-5, rtol=0)  # passes are made up of other rows
    torch.testing.assert_close(parts.advantage, whole.advantage, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        parts.result.at(parts.result.tree.edges), whole.result.at(whole.result.tree.edges), atol=1e-5, rtol=0
    )
    inline = Run(s.model_copy(update={"prompts_per_rollout": 2}), tmp_path / "c", rewards={"mine": plain, "other": red_less})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowgrain.training.trainer.Scoring", functools.partial(forced_inline, Scoring))
        same = inline.sample_tree(1)
    for name in ("mine", "other"):
        assert torch.equal(same.scores[name].values, parts.scores[name].values)
    assert torch.equal(same.advantage, parts.advantage)


def red_less(images, prompts):
    return (1 - images[:, 0]).mean((1, 2))


def forced_inline(kind, rewards, batch, background):
    assert background
    return kind(rewards, batch, background=False)


def test_a_few_failures_are_masked_and_counted(tiny, tmp_path):
    def flaky(images, prompts):
        values = images.mean((1, 2, 3)).numpy().copy()
        values[0] = np.inf
        return values

    metrics = Run(tiny, tmp_path, rewards={"mine": flaky}).step(1)
    assert metrics["failed/mine"] == 1
    assert math.isfinite(metrics["reward/mine"])
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_non_finite_updates_are_skipped_and_stop_the_run(tiny, tmp_path):
    run = Run(settings({**tiny.model_dump(), "max_skipped_updates": 2, "max_steps": 5}), tmp_path)
    before = {name: p.clone() for name, p in run.policy.trained.items()}
    sampled = run.sample_tree(1)
    run.policy.train_velocity = lambda x, sigma, cond, guidance: x * next(iter(run.policy.trained.values())).sum() * torch.nan
    assert run.update(sampled)["updates/skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in run.policy.trained.items())
    with pytest.raises(RunStopped, match="smaller learning_rate"):
        run.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-000001"]


def test_executed_passes_are_the_plans(tiny, tmp_path):
    from flowgrain.methods.algorithms import build, plan_tree
    from flowgrain.core.tree import cost

    metrics = Run(tiny, tmp_path).step(1)
    price = cost(plan_tree(build(tiny), tiny))
    assert metrics["forward_passes"] == 2 * price.forward_passes
    assert metrics["train_forward_passes"] == 2 * price.train_forward_passes


@pytest.mark.parametrize("rank", [0, 4])
def test_reference_guidance_and_kl(tiny, tmp_path, rank):
    changes = {"kl_weight": 0.1, "lora_rank": rank, "guidance_scale": 2.0, "learning_rate": 1e-2}
    run = Run(settings({**tiny.model_dump(), **changes}), tmp_path)
    base = {n: p.clone() for n, p in run.policy.transformer.named_parameters() if "lora" not in n}
    assert run.step(1)["kl"] == pytest.approx(0, abs=1e-9)
    assert run.step(2)["kl"] > 0
    if rank:
        for name, parameter in run.policy.transformer.named_parameters():
            assert "lora" in name or torch.equal(parameter, base[name]), name


def test_bf16_sampling_keeps_fp32_masters(tiny, tmp_path):
    run = Run(settings({**tiny.model_dump(), "dtype": "bfloat16"}), tmp_path)
    metrics = run.step(1)
    assert metrics["ratio/max"] == 1
    assert {p.dtype for p in run.policy.trained.values()} == {torch.float32}
    assert {p.dtype for p in run.policy.sampler.parameters()} == {torch.bfloat16}
    for a, b in zip(run.policy.sampler.parameters(), run.policy.transformer.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())


def test_ema_swap_gives_the_trained_weights_back(tiny, tmp_path):
    run = Run(settings({**tiny.model_dump(), "ema_decay": 0.9, "learning_rate": 1e-2}), tmp_path)
    run.step(1)
    run.step(2)
    before = {name: p.clone() for name, p in run.policy.trained.items()}
    with run.policy.averaged():
        assert any(not torch.equal(p, before[name]) for name, p in run.policy.trained.items())
    assert all(torch.equal(p, before[name]) for name, p in run.policy.trained.items())


@pytest.mark.parametrize("rank", [0, 4])
def test_export_loads_in_plain_diffusers(tiny, tmp_path, rank):
    run = Run(settings({**tiny.model_dump(), "lora_rank": rank, "learning_rate": 1e-2}), tmp_path)
    run.step(1)
    run.step(2)
    ours = run.sample(["three green circles"], num_steps=4)
    folder = run.export()
    if rank:
        plain = SD3Transformer2DModel.from_pretrained(WEIGHTS / "transformer")
        plain.load_lora_adapter(str(folder / "lora"), prefix="transformer", use_safetensors=True)
    else:
        plain = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    backbone = ShapesBackbone.load()
    backbone.transformer = plain.eval()
    fresh = Run(tiny, tmp_path / "other", backbone=backbone)
    torch.testing.assert_close(fresh.sample(["three green circles"], num_steps=4), ours, atol=1e-5, rtol=0)
    base = Run(tiny, tmp_path / "base").sample(["three green circles"], num_steps=4)
    assert (base - ours).abs().max() > 1e-3


def test_from_python_with_a_reward_of_ones_own(tmp_path):
    def redness(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    small = {"num_steps": 4, "group_size": 3, "prompts_per_step": 2, "max_steps": 2, "eval_prompts": 4, "eval_every": 1}
    run = Run(recipe("demo", **small), tmp_path, rewards={"redness": redness}, prompts=["three green circles"])
    lines = run.train()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "eval/redness" in lines[0]
    assert "eval/oracle" in lines[-1]
    assert run.evaluate(num_steps=4).scores["redness"].shape == (4,)
    assert run.sample(["two red squares"]).shape == (1, 3, 32, 32)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    with pytest.raises(SettingsError, match="already holds a run"):
        Run(recipe("demo", **small), tmp_path).train()


def test_embedded_guidance_goes_into_the_conditioning(tiny, tmp_path):
    """A backbone of FLUX's make gets its scale as an input, one forward a state and no unconditional half."""
    seen = []

    class Embedded(ShapesBackbone):
        embedded_guidance = True

        def velocity(self, transformer, x, sigma, cond):
            seen.append(cond["guidance"])
            return super().velocity(transformer, x, sigma, cond)

    run = Run(settings({**tiny.model_dump(), "guidance_scale": 3.5}), tmp_path, backbone=Embedded.load())
    metrics = run.step(1)
    assert all((scale == 3.5).all() for scale in seen)
    assert sum(len(scale) for scale in seen) == metrics["forward_passes"] + metrics["train_forward_passes"]


def test_every_setting_can_be_written_as_text():
    """As on the command line: what a field's own value looks like there is that value again."""
    own = {"method": "mixgrpo", "window_size": 2, "psi": None}
    usual = settings(own)
    for name, value in usual.model_dump(mode="json").items():
        if isinstance(value, dict) or value is None or value == []:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        assert getattr(settings({**own, name: text}), name) == getattr(usual, name), name
    assert settings({**own, "tail_order": "2"}).tail_order == 2

"""What a resumed run must keep, and what it may change, as the fields declare it."""

import pytest

from flowgrain import METHODS, SettingsError, load_config
from flowgrain.config.explain import setting_paths
from flowgrain.training.state import check_kept, kept_settings

KEPT = {
    "method.name",
    *("model.name", "model.path", "model.revision", "model.height", "model.width"),
    *("model.max_prompt_tokens", "model.t5", "model.vae_dtype", "model.encoder_dtype"),
    *("lora.rank", "lora.alpha", "lora.target_modules"),
    *("sampling.num_steps", "sampling.grid", "sampling.shift"),
    *("sampling.shift_terminal", "sampling.sigma_min"),
    *("data.prompts", "data.pairs", "data.images"),
    *("runtime.seed", "runtime.dtype"),
    *("method.reward_weights", "rollout.max_staleness"),
}
OF_POLICY_GRADIENTS = {"method.sde_type", "method.psi"}

OTHER_VALUES = {
    "model.name": "other",
    "model.path": "elsewhere",
    "model.revision": "v2",
    "model.height": 256,
    "model.width": 256,
    "model.max_prompt_tokens": 99,
    "model.t5": False,
    "model.vae_dtype": "bfloat16",
    "model.encoder_dtype": "float32",
    "lora.rank": 2,
    "lora.alpha": 3.0,
    "lora.target_modules": ["to_q"],
    "sampling.num_steps": 5,
    "sampling.shift": 2.0,
    "sampling.grid": "model",
    "sampling.shift_terminal": 0.1,
    "sampling.sigma_min": 0.01,
    "data.prompts": "other.txt",
    "data.pairs": "other.jsonl",
    "data.images": "other.jsonl",
    "runtime.seed": 3,
    "runtime.dtype": "bfloat16",
    "method.sde_type": "dance_sde",
    "method.reward_weights": "sum_to_one",
    "rollout.max_staleness": 1,
}
MAY_CHANGE = {
    "training.max_steps": 7,
    "training.max_seconds": 60.0,
    "training.prompts_per_step": 3,
    "training.micro_batch_size": 2,
    "training.graph_memory": 1.0,
    "training.ema_every": 2,
    "training.checkpoint_every": 1,
    "training.keep_checkpoints": 5,
    "training.max_failed_rewards": 0.5,
    "optimizer.learning_rate": 1e-5,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.max_grad_norm": 0.5,
    "optimizer.max_skipped_updates": 9,
    "sampling.batch_size": 3,
    "sampling.guidance_scale": 2.0,
    "sampling.prompts_per_chunk": 1,
    "evaluation.every": 3,
    "evaluation.num_prompts": 8,
    "evaluation.num_steps": 9,
    "evaluation.split": "validation",
    "evaluation.rewards": ["towers"],
    "data.eval_prompts": "eval.txt",
    "model.embedding_cache": "cache",
    "model.long_prompts": "truncate",
    "model.vae_tiling": True,
    "model.gradient_checkpointing": True,
    "model.attention_backend": "native",
    "runtime.device": "cpu",
    "runtime.threads": 2,
    "runtime.rollout_weights": "replica",
    "runtime.context_parallel": 2,
    "runtime.trackers": ["tensorboard"],
    "method.group_size": 4,
    "method.clip_range": 1e-3,
    "rollout.workers": 1,
    "name": "other",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_kept_settings_of_every_method(method):
    kept = set(kept_settings(load_config(method)))
    ours = OF_POLICY_GRADIENTS if "sde_type" in METHODS.get(method).model_fields else set()
    assert kept == KEPT | ours
    assert kept <= set(setting_paths(METHODS.get(method)))


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_a_kept_setting_is_refused(tmp_path, path):
    needed = {"lora.rank": 1} if path.startswith("lora.") else {}
    needed |= {"rollout.workers": 1} if path.startswith("rollout.") else {}
    methods = {"data.pairs": "diffusion_dpo", "data.images": "sft"}
    config = load_config(methods.get(path, "g2rpo"), needed)
    changed = config.with_changes({path: OTHER_VALUES[path]})
    with pytest.raises(SettingsError) as error:
        check_kept(changed, config.to_dict(), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}={OTHER_VALUES[path]}: the run in {tmp_path} was started")
    assert message.endswith("must keep it. Start a new run.")


def test_a_run_from_before_a_setting_existed_can_be_resumed(tmp_path):
    config = load_config("g2rpo")
    saved = config.to_dict()
    for name in ("grid", "sigma_min"):
        del saved["sampling"][name]
    del saved["rollout"]
    del saved["lora"]["target_modules"], saved["method"]["reward_weights"]
    check_kept(config, saved, tmp_path)
    changed = config.with_changes({"method.reward_weights": "sum_to_one"})
    with pytest.raises(SettingsError, match=r"started with as_given and must keep it"):
        check_kept(changed, saved, tmp_path)


def test_other_noise_strengths_are_refused(tmp_path):
    changes = {"method.sde_type": "calibrated_sde", "method.psi": [0.5] * 16}
    config = load_config("g2rpo", changes)
    changed = config.with_changes({"method.psi": [0.4] * 16})
    with pytest.raises(SettingsError, match=r"method\.psi=\[0\.4, "):
        check_kept(changed, config.to_dict(), tmp_path)


def test_another_method_is_refused(tmp_path):
    saved = load_config("flow_grpo").to_dict()
    with pytest.raises(SettingsError, match=r"method\.name=grpo_guard: .*started with flow_grpo"):
        check_kept(load_config("grpo_guard"), saved, tmp_path)


def test_rewards_keep_their_names_and_weights(tmp_path):
    rewards = [{"name": "oracle", "weight": 1.0}, {"name": "towers", "weight": 0.5}]
    config = load_config("g2rpo", {"rewards": rewards})
    for other in (["oracle"], ["oracle", "towers"], ["oracle", "preference"]):
        with pytest.raises(SettingsError, match=r"^rewards: the weights are .*must keep them"):
            check_kept(config.with_changes({"rewards": other}), config.to_dict(), tmp_path)
    moved = [{**rewards[1], "batch_size": 8}, {**rewards[0], "device": "cuda"}]
    check_kept(config.with_changes({"rewards": moved}), config.to_dict(), tmp_path)


def test_the_ema_may_change_but_neither_start_nor_stop(tmp_path):
    config = load_config("g2rpo", {"training.ema_decay": 0.9})
    check_kept(config.with_changes({"training.ema_decay": 0.5}), config.to_dict(), tmp_path)
    without = config.with_changes({"training.ema_decay": 0.0})
    for now, saved in ((without, config), (config, without)):
        with pytest.raises(SettingsError, match="cannot start or stop the EMA"):
            check_kept(now, saved.to_dict(), tmp_path)


@pytest.mark.parametrize("path", MAY_CHANGE)
def test_other_settings_may_change(tmp_path, path):
    config = load_config("g2rpo")
    changed = config.with_changes({path: MAY_CHANGE[path]})
    assert changed != config
    check_kept(changed, config.to_dict(), tmp_path)

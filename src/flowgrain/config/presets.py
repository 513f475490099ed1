"""Presets: changes that adapt any configuration to a machine."""

from collections.abc import Mapping
from typing import Any

from flowgrain.methods import METHODS
from flowgrain.settings import SettingsError, did_you_mean

PRESETS = {"one-gpu": "LoRA, small batches and rewards on the CPU, for one GPU with 80 GB"}


def apply_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the changes of a preset.

    "one-gpu" replaces a full fine-tune by a LoRA of rank 32. The learning rate of a full fine-tune
    is too small for a LoRA, so the preset sets the published rate of the method for a LoRA, which
    may belong to another rank. If none was published, it sets 1e-4, which was not tuned.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in PRESETS:
        raise SettingsError(
            f"--preset {name}: there is no such preset. {did_you_mean(name, PRESETS)}"
        )
    changed = dict(values)
    if not values.get("lora", {}).get("rank"):
        changed["lora"] = {**values.get("lora", {}), "rank": 32}
        rate = _published_rate(values.get("method", {})) or 1e-4
        changed["optimizer"] = {**values.get("optimizer", {}), "learning_rate": rate}
    model = values.get("model", {}).get("name", "shapes")
    # FLUX.1 has five times the parameters of SD3.5-medium.
    batch_size = 4 if model == "flux" else 16
    changed["sampling"] = {
        **values.get("sampling", {}),
        "batch_size": batch_size,
        "prompts_per_chunk": 4,
    }
    changed["training"] = {**values.get("training", {}), "micro_batch_size": 1}
    changed["rewards"] = [_on_cpu(reward) for reward in values.get("rewards", [])]
    evaluation = values.get("evaluation", {})
    evaluated = [_on_cpu(reward) for reward in evaluation.get("rewards", [])]
    changed["evaluation"] = {**evaluation, "rewards": evaluated}
    return changed


def _published_rate(method: Any) -> float | None:
    """The published learning rate of a LoRA, if there is one."""
    name = method.get("name") if isinstance(method, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        return None
    return METHODS.get(name).learning_rates.lora


def _on_cpu(reward: Any) -> Any:
    """`reward` on the CPU, if it has a `device` option."""
    if isinstance(reward, Mapping) and "device" in reward:
        return {**reward, "device": "cpu"}
    return reward

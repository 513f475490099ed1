"""Export of trained parameters in the formats of diffusers, and loading of such exports."""

import json
import shutil
from pathlib import Path
from typing import Literal

from huggingface_hub import save_torch_state_dict

from flowgrain.distributed.sharding import class_name, full_state_dict, full_tensor
from flowgrain.models import Backbone
from flowgrain.settings import SettingsError
from flowgrain.training.checkpoint import replace_folder
from flowgrain.training.errors import RunStopped
from flowgrain.training.health import first_not_finite
from flowgrain.training.policy import Policy

_LORA_METADATA = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")
"""Entries of the LoRA configuration that LoRA loaders read."""


def export_policy(policy: Policy, folder: Path) -> None:
    """Write the EMA parameters, or the trained parameters of a run without EMA.

    A full fine-tune is written to `folder`/transformer, for from_pretrained of diffusers. A LoRA is
    written to `folder`/lora, for load_lora_weights. An existing export is replaced at the end.

    Raises:
        RunStopped: a parameter is not finite. Nothing was written.
    """
    temporary = folder.with_name(f".{folder.name}.new")
    main = policy.world.is_main
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    with policy.averaged():
        exported = policy.parameters or dict(policy.model.named_parameters())
        broken = first_not_finite(exported, policy.world)
        if broken is not None:
            raise RunStopped(f"{folder}: not written, because {broken} contains NaN or infinity")
        if main:
            temporary.mkdir(parents=True)
        if policy.lora:
            _export_lora(policy, temporary / "lora")
        elif policy.world.size == 1:
            policy.model.save_pretrained(temporary / "transformer")  # type: ignore[operator]
        else:
            _export_sharded(policy, temporary / "transformer")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for part in temporary.iterdir():  # the directory may also contain the best checkpoint
            replace_folder(part, folder / part.name)
        temporary.rmdir()


def _export_lora(policy: Policy, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(policy.model)
    layers = {name: full_tensor(value) for name, value in layers.items()}
    if policy.world.is_main:
        config = policy.model.peft_config["default"].to_dict()  # type: ignore[union-attr,index]
        policy.backbone.lora_format.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata={
                k: v for k, v in config.items() if k in _LORA_METADATA
            },
        )


def _export_sharded(policy: Policy, folder: Path) -> None:
    """Write the files of save_pretrained. No rank holds the full model in its device memory."""
    state = full_state_dict(policy.model)
    if policy.world.is_main:
        folder.mkdir(parents=True)
        config = json.loads(policy.model.to_json_string())  # type: ignore[operator]
        config["_class_name"] = class_name(policy.model)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(state, folder, filename_pattern=pattern)


def load_export(backbone: Backbone, path: Path, kind: Literal["lora", "transformer"]) -> None:
    """Load exported parameters into `backbone`.

    Args:
        backbone: backbone without LoRA.
        path: a LoRA directory or file, or a transformer directory.
        kind: what `path` contains.

    Raises:
        SettingsError: the parameters belong to another model.
    """
    try:
        if kind == "lora":
            _load_lora(backbone, path)
        else:
            transformer = backbone.transformer
            from_pretrained = type(transformer).from_pretrained  # type: ignore[attr-defined]
            found = from_pretrained(path, torch_dtype=transformer.dtype)
            transformer.load_state_dict(found.state_dict())
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise SettingsError(f"{path}: cannot be loaded into this model: {error}") from error


def _load_lora(backbone: Backbone, path: Path) -> None:
    stored = backbone.lora_format.lora_state_dict(path)
    layers = [name for name in stored if "lora_A" in name or "lora_B" in name]
    foreign = [name for name in layers if name.startswith("text_encoder")]
    if foreign:
        raise ValueError(f"it adapts a text encoder ({foreign[0]}), which flowgrain does not train")
    backbone.load_lora(path)
    names = [name for name, _ in backbone.transformer.named_parameters()]
    loaded = sum("lora_A" in name or "lora_B" in name for name in names)
    if not layers or loaded != len(layers):
        raise ValueError(f"the model takes {loaded} of its {len(layers)} tensors")

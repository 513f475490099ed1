"""Loading of diffusers pipelines, and checks of the settings that need the loaded model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from flowgrain.hub import unreachable, use_cache_if_offline
from flowgrain.models.base import Dtypes, ModelConfig
from flowgrain.models.embeddings import EmbeddingCache, fingerprint
from flowgrain.models.weights import FILES, WeightFiles, build_empty
from flowgrain.settings import SettingsError, one_line


def saved_parts(pipeline: Any, model: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return library and class of the parts of the pipeline at `model.path`, by name.

    Args:
        pipeline: pipeline class of diffusers.
        model: settings of the model.

    Raises:
        SettingsError: there is no diffusers pipeline.
    """
    path = Path(model.path or "")
    if path.exists() and not (path / "model_index.json").exists():
        raise SettingsError(
            f"model.path={model.path}: the directory contains no model_index.json. "
            "Give the directory of a diffusers pipeline."
        )
    offline = use_cache_if_offline(model.path)
    try:
        index = pipeline.load_config(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise SettingsError(_not_loaded(model, error, offline)) from error
    # An entry is a pair of library and class, or a pair of None for a part that was left out.
    return {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in index.items()
        if isinstance(entry, list | tuple) and entry[0]
    }


def empty_transformer(model: ModelConfig, dtype: torch.dtype) -> tuple[Any, WeightFiles] | None:
    """Return the transformer at `model.path` without weights, and the files of its weights.

    Args:
        model: settings of the model.
        dtype: dtype of the transformer.

    Returns:
        The transformer and its files, or None if only `from_pretrained` can load it: its weights
        are quantized or not in the safetensors format, or its class is not a class of diffusers.

    Raises:
        SettingsError: a file is missing, damaged or truncated, or belongs to another model.
    """
    folder = _transformer_folder(model)
    if not any(folder.glob("*.safetensors*")) and any(folder.glob("*.bin")):
        return None
    setting = f"model.path={model.path}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{setting}: {one_line(error)}") from error
    transformer = build_empty(config, dtype)
    if transformer is None:
        return None
    transformer.register_to_config(_name_or_path=str(folder))
    weights = WeightFiles(folder, setting)
    weights.check(transformer)
    return transformer, weights


def _transformer_folder(model: ModelConfig) -> Path:
    """The local directory of the transformer. Files on the Hub are downloaded to its cache."""
    path = str(model.path)
    if Path(path).is_dir():
        return Path(path) / "transformer"
    offline = use_cache_if_offline(path)
    files = [f"transformer/{name}" for name in FILES]
    try:
        return Path(snapshot_download(path, revision=model.revision, allow_patterns=files)) / (
            "transformer"
        )
    except (OSError, ValueError) as error:
        raise SettingsError(_not_loaded(model, error, offline)) from error


def load_pipeline(
    pipeline: Any, model: ModelConfig, dtypes: Dtypes, parts: Mapping[str, Any]
) -> Any:
    """Return the pipeline at `model.path`.

    Args:
        pipeline: pipeline class of diffusers.
        model: settings of the model.
        dtypes: dtypes of its parts.
        parts: loaded parts by name, which replace the saved parts. None omits a part.

    Raises:
        SettingsError: the pipeline cannot be loaded.
    """
    names = {"transformer": dtypes.transformer, "vae": dtypes.vae, "default": dtypes.encoders}
    offline = use_cache_if_offline(model.path)
    try:
        return pipeline.from_pretrained(model.path, revision=model.revision, dtype=names, **parts)
    except (OSError, ValueError) as error:
        raise SettingsError(_not_loaded(model, error, offline)) from error


def _not_loaded(model: ModelConfig, error: Exception, offline: bool) -> str:
    """The message of a model that cannot be loaded."""
    if offline and isinstance(error, OSError):
        return unreachable(f"model.path={model.path}")
    return f"model.path={model.path}: {one_line(error)}"


def check_size(model: ModelConfig, side: int) -> None:
    """Check that height and width are multiples of `side` pixels.

    Raises:
        SettingsError: they are not. The message names the nearest valid sizes.
    """
    for name, size in (("height", model.height), ("width", model.width)):
        if size % side:
            sizes = sorted({max(size // side, 1) * side, -(-size // side) * side})
            raise SettingsError(
                f"model.{name}={size}: model.name={model.name} needs a multiple of {side}. "
                f"Use {' or '.join(map(str, sizes))}."
            )


def apply_options(model: ModelConfig, transformer: Any, vae: Any) -> None:
    """Apply VAE tiling, gradient checkpointing and the attention backend of the settings.

    Raises:
        SettingsError: the attention backend is unknown or not available.
    """
    if model.vae_tiling:
        vae.enable_tiling()
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        if vae._supports_gradient_checkpointing:  # only has an effect on decoding with gradient
            vae.enable_gradient_checkpointing()
    if model.attention_backend:
        try:
            transformer.set_attention_backend(model.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise SettingsError(
                f"model.attention_backend={model.attention_backend}: {error}"
            ) from error


def open_cache(model: ModelConfig, dtype: torch.dtype) -> EmbeddingCache | None:
    """Return the embedding cache of the settings for text encoders in `dtype`, or None."""
    if not model.embedding_cache:
        return None
    key = f"{fingerprint(str(model.path), model.revision)} tokens={model.max_prompt_tokens}"
    return EmbeddingCache(Path(model.embedding_cache), f"{key} t5={model.t5} {dtype}")

"""Loading of diffusers pipelines, and checks of the settings that need the loaded model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowgrain.hub import unreachable, use_cache_if_offline
from flowgrain.models.base import Dtypes, ModelConfig
from flowgrain.models.embeddings import EmbeddingCache, fingerprint
from flowgrain.settings import SettingsError, one_line


def saved_parts(pipeline: Any, model: ModelConfig) -> set[str]:
    """Return the names of the parts of the pipeline that is saved at `model.path`.

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
    return {name for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0]}


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

"""Checkpoints of open_clip as models of transformers."""

from collections.abc import Mapping

from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPModel

from flowgrain.rewards.checkpoints import load_state, loading, read_checkpoint
from flowgrain.rewards.options import OptionError

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE_BLOCKS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an open_clip ViT, renamed for `transformers.CLIPModel`.

    Raises:
        ValueError: a key does not belong to an open_clip ViT.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        tower, _, rest = key.partition("transformer.resblocks.")
        if key in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[key]] = value
        elif key in _PROJECTIONS:
            renamed[_PROJECTIONS[key]] = value.T.contiguous()
        elif rest and tower in ("", "visual."):
            number, _, parameter = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            renamed |= {f"{layer}.{name}": part for name, part in _block(parameter, value).items()}
        elif key != "attn_mask":
            raise ValueError(f"{key} is not a key of an open_clip ViT")
    return renamed


def _block(parameter: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter of a transformer block with the names of transformers."""
    if parameter.startswith("attn.in_proj_"):
        kind = parameter.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    module, _, kind = parameter.rpartition(".")
    if module not in _BLOCK:
        raise ValueError(f"{parameter} is not a parameter of a block of an open_clip ViT")
    return {f"{_BLOCK[module]}.{kind}": value}


def load_open_clip(path: str, checkpoint: str, allow_pickle: bool) -> CLIPModel:
    """A CLIP model with the parameters of a checkpoint.

    Args:
        path: directory or Hugging Face repository with the configuration of the CLIP model.
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub, with the names of
            open_clip or of transformers.
        allow_pickle: also read files other than .safetensors.

    Raises:
        OptionError: the configuration or the checkpoint cannot be read, or they do not match.
    """
    with loading(path):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, CLIPConfig):
        raise OptionError(f"path={path}: not a CLIP model. {checkpoint} needs a CLIP model.")
    state = read_checkpoint(checkpoint, allow_pickle)
    if any("resblocks" in key for key in state):
        try:
            state = from_open_clip(state)
        except ValueError as error:
            raise OptionError(f"checkpoint={checkpoint}: {error}.") from error
    model = CLIPModel(config)
    load_state(model, state, checkpoint, path)
    return model

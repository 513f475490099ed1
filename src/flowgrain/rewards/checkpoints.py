"""Checkpoint files of rewards: their tensors, a model that takes all of them and lacks none, and the head that some end in."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_checkpoint(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or, if that is allowed in so many words, of a pickled one, of which only tensors are read.

    Raises ValueError naming the file and the way out.
    """
    if not path.is_file():
        raise ValueError(f"reward_models: there is no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code; convert it to safetensors, or set reward_pickles=true to read its tensors"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} holds more than tensors, or is no checkpoint; save its state dict alone ({error})") from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict (tensors by name, or such behind `state_dict`)")
    return dict(state)


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Puts `state`, read from `path`, into `model`, the make of `name`. Raises ValueError unless both have the same tensors."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch's word for shapes that differ
        raise ValueError(f"reward_models: {path} is no checkpoint of {name}: {error}") from error
    missing = [key for key in missing if not key.endswith("position_ids")]  # a counter, which some versions save
    if missing or unexpected:
        raise ValueError(
            f"reward_models: {path} is no checkpoint of {name}: {len(missing)} tensors are missing, {len(unexpected)} too many "
            f"(first: {[*missing, *unexpected][0]})"
        )


def linear_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """A head of the sizes of `state`, `0.weight` and so on: linear layers and, between some of them, dropout, which is off.

    Raises KeyError if there is not even the first.
    """
    if "0.weight" not in state:
        raise KeyError("the first layer of the head")
    layers: list[nn.Module] = []
    for number in range(1 + max(int(key.partition(".")[0]) for key in state)):
        weight = state.get(f"{number}.weight")
        layers.append(nn.Identity() if weight is None else nn.Linear(weight.shape[1], weight.shape[0]))
    return nn.Sequential(*layers)

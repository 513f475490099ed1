"""Checkpoint files of rewards: download, tensors, and models that are built from them."""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgrain.hub import unreachable, use_cache_if_offline
from flowgrain.rewards.options import OptionError
from flowgrain.settings import one_line

_HUB_FILE = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)/(?P<file>.+)")


def checkpoint_file(checkpoint: str, allow_pickle: bool) -> Path:
    """The local file of a checkpoint. A file of the Hugging Face Hub is downloaded first.

    Args:
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub.
        allow_pickle: also accept files other than .safetensors.

    Raises:
        OptionError: there is no such file, it is a pickle file, or the download failed.
    """
    path = Path(checkpoint).expanduser()
    on_hub = None if path.is_file() else _HUB_FILE.fullmatch(checkpoint)
    if on_hub is None and not path.is_file():
        raise OptionError(
            f"checkpoint={checkpoint}: there is no such file. "
            "Give the path of a file, or ORG/REPO/FILE on the Hugging Face Hub."
        )
    if path.suffix != ".safetensors" and not allow_pickle:
        raise OptionError(
            f"checkpoint={checkpoint}: a pickle file can run code when it is read. "
            "Set allow_pickle=true to read only its tensors, or convert it to safetensors."
        )
    if on_hub is None:
        return path
    offline = use_cache_if_offline(checkpoint)
    try:
        return Path(hf_hub_download(on_hub["repository"], on_hub["file"]))
    except (OSError, ValueError) as error:
        if offline and isinstance(error, OSError):
            raise OptionError(unreachable(f"checkpoint={checkpoint}", "file")) from error
        raise OptionError(
            f"checkpoint={checkpoint}: there is no such local file, "
            f"and the download from the Hugging Face Hub failed: {error}"
        ) from error


def read_checkpoint(checkpoint: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Of a pickle file, only tensors are unpickled.

    Args:
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub.
        allow_pickle: also read files other than .safetensors.

    Raises:
        OptionError: the file cannot be read.
    """
    path = checkpoint_file(checkpoint, allow_pickle)
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise OptionError(
            f"checkpoint={checkpoint}: not a checkpoint, or it contains objects other than "
            f"tensors. Save only the state dict. ({error})"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise OptionError(
            f"checkpoint={checkpoint}: not a state dict. Save tensors by name, "
            "or a mapping with the key `state_dict`."
        )
    return dict(state)


def load_state(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, kind: str) -> None:
    """Load `state` into `model`.

    Args:
        model: the model, changed in place.
        state: tensors by name.
        checkpoint: the option from which `state` was read, for error messages.
        kind: name of the model, for error messages.

    Raises:
        OptionError: `model` and `state` do not have the same tensors.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # different shapes
        raise OptionError(
            f"checkpoint={checkpoint}: not a checkpoint of {kind}: {error}"
        ) from error
    if missing or unexpected:
        raise OptionError(
            f"checkpoint={checkpoint}: not a checkpoint of {kind}: {len(missing)} tensors are "
            f"missing and {len(unexpected)} are unexpected (first: {[*missing, *unexpected][0]})."
        )


def linear_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """A sequence of linear layers with the sizes of `state` (`0.weight`, `2.weight`, ...).

    Missing numbers are dropout layers of the original model. They become identities.

    Raises:
        KeyError: `0.weight` is missing.
    """
    if "0.weight" not in state:
        raise KeyError("the first layer of the head")
    layers: list[nn.Module] = []
    for number in range(1 + max(int(key.partition(".")[0]) for key in state)):
        weight = state.get(f"{number}.weight")
        layers.append(
            nn.Identity() if weight is None else nn.Linear(weight.shape[1], weight.shape[0])
        )
    return nn.Sequential(*layers)


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn errors of `from_pretrained(path)` into errors of the option `path`.

    Raises:
        OptionError: the model cannot be loaded, or a package is missing.
    """
    offline = use_cache_if_offline(path)
    try:
        yield
    except ImportError as error:
        raise OptionError(
            f"path={path}: a package is missing ({error}). "
            "SigLIP models need: pip install 'flowgrain[siglip]'"
        ) from error
    except (OSError, ValueError) as error:
        if offline and isinstance(error, OSError):
            raise OptionError(unreachable(f"path={path}")) from error
        raise OptionError(
            f"path={path}: the model cannot be loaded ({one_line(error)}). "
            "Give a directory or a repository on the Hugging Face Hub."
        ) from error

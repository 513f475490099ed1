"""Weights of diffusers models: safetensors files, read tensor by tensor into an empty model.

An empty model has the structure of a model, but its parameters are on the meta device and take no
memory. `fill` gives them values. A rank that only holds shards never reads more than its shards.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowgrain.distributed.sharding import is_sharded, local_rows, with_local_tensor
from flowgrain.settings import SettingsError, one_line

log = logging.getLogger(__name__)

_NAME = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", _NAME, f"{_NAME}.index.json", "diffusion_pytorch_model-*.safetensors")
"""Files of a diffusers model without variant, as patterns."""


class WeightFiles:
    """The tensors of the safetensors files of a diffusers model, by name.

    Files are memory-mapped. Processes of one machine share the pages, and pages are only read when
    they are used. If a tensor of a mapping is modified, only this process sees it, and only the
    modified pages take memory.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        """Open the files of a directory.

        Args:
            folder: directory with one safetensors file, or several files and their index.
            setting: the setting that names the model and its value, for error messages.

        Raises:
            SettingsError: a file is missing, damaged or truncated.
        """
        self.folder, self.setting = folder, setting
        index = folder / f"{_NAME}.index.json"
        places = self._read_index(index) if index.is_file() else None
        files = [_NAME] if places is None else sorted(set(places.values()))
        opened = {name: self._open(folder / name) for name in files}
        found = {key: file for file in opened.values() for key in file.keys()}  # noqa: SIM118
        for key in places or ():
            if key not in found:
                raise self._error(f"{index} lists {key}, but no file contains it")
        self._files = found

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return dict(places)
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(f"{path} is damaged ({one_line(error)})") from error

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise self._error(f"{path} is missing") from error
        except (SafetensorError, OSError) as error:
            raise self._error(f"{path} is damaged or truncated ({one_line(error)})") from error

    def _error(self, problem: str) -> SettingsError:
        return SettingsError(f"{self.setting}: {problem}. Download the model again.")

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, file by file."""
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype, as a view of the mapped file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows start..stop of a tensor, as a view of the mapped file."""
        rows: Tensor = self._files[name].get_slice(name)[start:stop]
        return rows

    def check(self, model: nn.Module) -> None:
        """Check that the files contain all parameters and persistent buffers of `model`.

        Tensors that the model does not have are logged and not used.

        Raises:
            SettingsError: a tensor is missing or has another shape.
        """
        expected = model.state_dict()
        for name, value in expected.items():
            if name not in self._files:
                raise self._error(f"the files in {self.folder} contain no tensor {name}")
            if self.shape(name) != tuple(value.shape):
                raise self._error(
                    f"the tensor {name} in {self.folder} has the shape {list(self.shape(name))}, "
                    f"but config.json gives {list(value.shape)}"
                )
        others = [name for name in self if name not in expected]
        if others:
            log.warning(
                "%s: %d tensors are not used, such as %s.", self.folder, len(others), others[0]
            )


def build_empty(config: Mapping[str, Any], dtype: torch.dtype) -> Any | None:
    """The model of a config.json with parameters and persistent buffers on the meta device.

    Tensors that are not saved, such as tables of positions, have their values.

    Args:
        config: configuration of a diffusers model.
        dtype: floating-point dtype of the model.

    Returns:
        The model in eval mode. None if diffusers has no such class, the weights are quantized, or
        the class keeps some of its weights in float32. `from_pretrained` can load these models.
    """
    model_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if model_class is None or not issubclass(model_class, diffusers.ModelMixin):
        return None
    if config.get("quantization_config") or model_class._keep_in_fp32_modules:
        return None
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained, for tensors that are not saved
    try:
        model = _construct(model_class, config)
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to("meta", kind)
    return model.eval()


def _construct(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model whose parameters are on the meta device. Its other tensors may be."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(dict(config))
        if not any(_unsaved_on_meta(module) for module in model.modules()):
            return model
    except (RuntimeError, NotImplementedError):
        pass  # the constructor reads the values of a tensor
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return model_class.from_config(dict(config))


def _unsaved_on_meta(module: nn.Module) -> bool:
    """Whether a tensor of `module` that is not saved is on the meta device."""
    own = (value for name, value in vars(module).items() if name not in ("_parameters", "_modules"))
    unsaved = [value for value in own if value is not module._buffers]
    unsaved += [module._buffers[name] for name in module._non_persistent_buffers_set]
    return any(_has_meta(value) for value in unsaved)


def _has_meta(value: object) -> bool:
    """Whether `value` is a tensor on the meta device, or a container of such a tensor."""
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, Mapping):
        return any(_has_meta(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_meta(item) for item in value)


@dataclass(frozen=True)
class _Place:
    """An empty tensor of a model.

    Attributes:
        tensors: `_parameters` or `_buffers` of its module.
        leaf: its name in `tensors`.
        empty: the tensor on the meta device.
        mapped: whether its value can be a view of the file.
    """

    tensors: dict[str, Any]
    leaf: str
    empty: Tensor
    mapped: bool

    @property
    def identity(self) -> object:
        """Equal for tensors that share one value. Buffers are never modified, so copies share."""
        return id(self.empty) if isinstance(self.empty, nn.Parameter) else self.empty.dtype


def fill(
    models: Iterable[tuple[nn.Module, bool]], weights: WeightFiles, device: torch.device
) -> None:
    """Replace the empty tensors of models by their values in the files, on `device`.

    Every tensor of the files is read once for all models, in their dtypes. A sharded parameter gets
    the rows of this rank. Apart from the values themselves, there is never more than one tensor in
    memory. A parameter that several models share stays shared.

    Args:
        models: the models, and whether their frozen tensors are never modified. On a CPU, these are
            views of the files if their dtype is the stored dtype.
        weights: the files.
        device: device of the values.
    """
    places: dict[str, list[_Place]] = defaultdict(list)
    for model, mapped in models:
        for name, place in _empty_tensors(model, mapped):
            places[name].append(place)
    for name in weights:
        values: dict[object, Tensor] = {}
        for place in places.pop(name, ()):
            if place.identity not in values:
                values[place.identity] = _value(place, weights, name, device)
            place.tensors[place.leaf] = values[place.identity]
    if places:
        raise RuntimeError(f"{weights.folder} contains no values of {', '.join(places)}")


def _empty_tensors(model: nn.Module, mapped: bool) -> Iterator[tuple[str, _Place]]:
    """The empty tensors of `model` with their names in the files."""
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, value in tensors.items():
                if value is not None and value.is_meta:
                    # Layers with an adapter contain the layer of the file as `base_layer`.
                    name = f"{prefix}.{leaf}".lstrip(".").replace(".base_layer.", ".")
                    frozen = not value.requires_grad
                    is_buffer = not isinstance(value, nn.Parameter)
                    yield name, _Place(tensors, leaf, value, is_buffer or (mapped and frozen))


@torch.no_grad()
def _value(place: _Place, weights: WeightFiles, name: str, device: torch.device) -> Tensor:
    """The value of an empty tensor."""
    empty = place.empty
    if is_sharded(empty):
        rows = weights.rows(name, *local_rows(empty))
        local = torch.empty(rows.shape, dtype=empty.dtype, device=device).copy_(rows)
        value = with_local_tensor(empty, local)
    else:
        value = weights.tensor(name)
        if not (place.mapped and device.type == "cpu" and value.dtype == empty.dtype):
            value = torch.empty(value.shape, dtype=empty.dtype, device=device).copy_(value)
    if isinstance(empty, nn.Parameter):
        return nn.Parameter(value, requires_grad=empty.requires_grad)
    return value

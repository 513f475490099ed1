"""Tensors of a checkpoint as safetensors files, written and read by any number of ranks."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from flowgrain.distributed.world import World


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write `tensors` to safetensors files in `folder`.

    Every rank writes its own shards, reads them back and compares them.

    Raises:
        OSError: a file cannot be written, or does not contain the written values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single process is not an error
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(dict(tensors), storage_writer=writer, no_dist=world.mesh is None)
        except CheckpointException as error:
            raise OSError(_causes(error)) from error
    for file in sorted(folder.glob(f"shard-{world.rank + 1:05d}-*.safetensors")):
        # safetensors 0.8 leaks 57 bytes per tensor that is read with framework="pt".
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict)
                tensor = tensors[name]
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if not torch.equal(torch.from_numpy(stored.get_tensor(name)), local.cpu()):
                    raise OSError(f"{name} in {file} differs from the written value")


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill `tensors` in place from `folder`. Any number of ranks may have written it.

    Raises:
        OSError: a tensor is missing or has another shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single process is not an error
        reader = HuggingFaceStorageReader(str(folder))
        try:
            load(dict(tensors), storage_reader=reader, no_dist=world.mesh is None)
        except CheckpointException as error:
            raise OSError(_causes(error)) from error


def _causes(error: CheckpointException) -> str:
    return "; ".join(str(cause) for cause, _ in error.failures.values())

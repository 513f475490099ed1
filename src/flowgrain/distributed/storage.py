"""Tensors of a checkpoint as safetensors files, written and read by any number of ranks (torch.distributed.checkpoint)."""

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

    Every rank writes its own shards and reads them back.

    Raises:
        OSError: a file could not be written, or differs from what was written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a single process
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
                    raise OSError(f"{name} in {file} differs from what was written")


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill `tensors` in place from `folder`, whatever number of ranks wrote it.

    Raises:
        OSError: a tensor is missing or has another shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a single process
        reader = HuggingFaceStorageReader(str(folder))
        try:
            load(dict(tensors), storage_reader=reader, no_dist=world.mesh is None)
        except CheckpointException as error:
            raise OSError(_causes(error)) from error


def _causes(error: CheckpointException) -> str:
    return "; ".join(str(cause) for cause, _ in error.failures.values())

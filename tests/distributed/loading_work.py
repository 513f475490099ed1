"""What each rank does in the tests of loading: fill the shards and copies of a twin."""

import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from twins import SIZE

from flowgrain import load_config
from flowgrain.distributed import init_process_group
from flowgrain.distributed.sharding import full_tensor, is_sharded, local_tensor
from flowgrain.training.copies import make_copies
from flowgrain.training.load import compute_dtype, load_empty

CPU = torch.device("cpu")
PARTS = ("model", "sampler", "reference", "old")


def config_of(path, method, changes):
    model = {"model.name": path.name.split("-")[0], "model.path": str(path)}
    model |= {f"model.{key}": value for key, value in SIZE.items()}
    model |= {
        "rewards": ["clip"],
        "runtime.seed": 4,
        "runtime.threads": 1,
        "optimizer.learning_rate": 1e-4,
    }
    return load_config(method, {**model, "lora.rank": 0, "runtime.dtype": "float32", **changes})


def is_mapped(tensor):
    """Whether the local part of `tensor` is in a mapped safetensors file. Needs Linux."""
    place = local_tensor(tensor.detach()).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, stop = (int(number, 16) for number in line.split()[0].split("-"))
            if start <= place < stop:
                return True
    return False


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated inside this context, without mapped files.

    Attributes:
        now: bytes of those tensors that still exist.
        peak: highest value of `now`.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.count(local_tensor(tensor))
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or not size:
            return
        size = 0 if is_mapped(tensor) else size

        def free(_):
            del self.seen[key]
            self.now -= size

        self.seen[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def whole_tensors(module):
    """Whole parameters and buffers of a module by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: full_tensor(value.detach()).clone() for name, value in named.items()}


def loaded(path, method, changes, backbone=None):
    """The trained model and its copies by name, and the bytes that every rank allocated for them.

    `backbone`: default: the backbone of the settings, whose transformer is empty.
    """
    config = config_of(path, method, changes)
    world = init_process_group(CPU)
    backbone = backbone or load_empty(config)
    with Allocated() as allocated:
        copies = make_copies(config, backbone, CPU, compute_dtype(config.runtime.dtype, CPU), world)
    found = {"peak": world.gather(allocated.peak), "parts": {}}
    for part in PARTS:
        module = getattr(copies, part)
        if module is not None:
            parameters = dict(module.named_parameters())
            found["parts"][part] = {
                "tensors": whole_tensors(module),
                "sharded": {name for name, p in parameters.items() if is_sharded(p)},
                "trained": {name for name, p in parameters.items() if p.requires_grad},
                "mapped": {name for name, p in parameters.items() if is_mapped(p)},
            }
    return found

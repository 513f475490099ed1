"""Context parallelism on CPUs: bytes, time and memory of a FLUX.1 transformer of random weights.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context.py --tokens 2304

In every repetition, each rank computes a whole row with one copy of the model, and then the ranks
compute a row together with another copy. Prints medians of the ratios.
"""

import argparse
import statistics
import time

import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrain.distributed import destroy_process_group, env_rank, init_process_group
from flowgrain.distributed.context import split_tokens

WIDTH, HEADS, DOUBLE, SINGLE, TEXT = 64, 8, 1, 2, 128


class Exchanged(TorchDispatchMode):
    """Counts the bytes that the collectives of this rank send to other ranks."""

    def __init__(self, ranks):
        super().__init__()
        self.bytes, self.ranks = 0, ranks

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = str(function)
        size = 0
        if "c10d" in name and isinstance(arguments[0], torch.Tensor):
            size = arguments[0].numel() * arguments[0].element_size()
        if "all_to_all" in name:  # a rank keeps its own part
            self.bytes += size * (self.ranks - 1) // self.ranks
        elif "all_gather" in name:
            self.bytes += size * (self.ranks - 1)
        return function(*arguments, **(kwargs or {}))


def make_model():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )


def inputs(tokens):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    side = int(tokens**0.5)
    grid = torch.cartesian_prod(torch.arange(tokens // side), torch.arange(side)).float()
    return {
        "hidden_states": randn(1, tokens, 64),
        "encoder_hidden_states": randn(1, TEXT, 64),
        "pooled_projections": randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], 1),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def one_pass(model, arguments, backward):
    """Seconds and CPU seconds of this process for a forward pass, or also a backward pass."""
    begin, cpu = time.perf_counter(), time.process_time()
    if backward:
        model(**arguments)[0].square().mean().backward()
        model.zero_grad()
    else:
        with torch.no_grad():
            model(**arguments)[0].sum()  # waits for the exchange of the output
    return time.perf_counter() - begin, time.process_time() - cpu


def saved_bytes(model, arguments):
    """Bytes that a forward pass keeps for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**arguments)[0]
    total = sum(storage.nbytes() for storage in storages.values())
    del output
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    world = init_process_group(device, env_rank()[1])
    whole, divided, arguments = make_model(), make_model(), inputs(options.tokens)
    split_tokens([divided], world, device)
    with torch.no_grad():
        difference = (divided(**arguments)[0] - whole(**arguments)[0]).abs().max()
    kept = [saved_bytes(model, arguments) for model in (whole, divided)]
    counted = []
    for backward in (False, True):
        with Exchanged(world.size) as exchanged:
            one_pass(divided, arguments, backward)
        counted.append(exchanged.bytes)
    if world.is_main:
        print(f"{options.tokens} + {TEXT} tokens, {world.size} ranks")
        print(f"largest difference of an output: {float(difference):.1e}")
        print(f"activations: {kept[0] / 1e6:.1f} MB whole, {kept[1] / 1e6:.1f} MB per rank")
        print(
            f"sent by a rank: forward {counted[0] / 1e6:.2f} MB, "
            f"with backward {counted[1] / 1e6:.2f} MB"
        )
    for backward, name in ((False, "forward"), (True, "forward and backward")):
        ratios = []
        for _ in range(options.repeats):
            alone = one_pass(whole, arguments, backward)
            world.gather(None)
            together = one_pass(divided, arguments, backward)
            world.gather(None)
            ratios.append([b / a for a, b in zip(alone, together, strict=True)] + [*alone])
        wall, cpu, seconds, cpu_seconds = (
            statistics.median(column) for column in zip(*ratios, strict=True)
        )
        if world.is_main:
            print(
                f"{name}: whole {seconds:.2f} s ({cpu_seconds:.2f} CPU s), divided / whole: "
                f"{wall:.2f} wall, {cpu:.2f} CPU of a rank"
            )
    destroy_process_group()


if __name__ == "__main__":
    main()

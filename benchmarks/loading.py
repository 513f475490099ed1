"""Measure the memory that loading a model takes in every process.

    python benchmarks/loading.py [--layers 8] [--processes 1,2,4]

Writes a pipeline with the transformer of SD3.5-medium, with fewer layers and random bfloat16
weights, to a temporary directory, and loads it for training in 1, 2 and 4 processes on gloo. Prints
what loading adds to the memory of a process, for the process with the highest value:

    anonymous   highest anonymous memory while loading
    expected    shards, replicas and buffers that are not views of the files, and the largest tensor
    pss         proportional memory after loading: a page of a mapped file is divided among the
                processes that have read it
    read        proportional memory after every page of the parameters was read, as in a forward
                pass

With another version of flowgrain in PYTHONPATH, it measures that version. Needs Linux.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CASES: dict[str, dict[str, Any]] = {
    "full, sharded": {"runtime.rollout_weights": "sharded", "lora.rank": 0},
    "full, replica": {"runtime.rollout_weights": "replica", "lora.rank": 0},
    "LoRA": {"runtime.rollout_weights": "replica", "lora.rank": 32},
}
FILE_SIZE = 1e9


def write_pipeline(folder: Path, layers: int) -> None:
    """Write a pipeline without text encoders. The weights are in files of about `FILE_SIZE`."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(min(layers, 13))),
            qk_norm="rms_norm",
        )
    parts = {"vae": AutoencoderKL(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    absent = dict.fromkeys([*encoders, "text_encoder_3", "tokenizer_3"])
    small = SD3Transformer2DModel(num_layers=1, num_attention_heads=1, caption_projection_dim=64)
    StableDiffusion3Pipeline(transformer=small, **parts, **absent).save_pretrained(folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    transformer.save_config(folder / "transformer")
    names, places, part, size = [], {}, {}, 0
    values = torch.randn(1 << 20, dtype=torch.bfloat16)
    for name, tensor in [*transformer.state_dict().items(), (None, None)]:
        if name is None or size > FILE_SIZE:
            names.append(f"diffusion_pytorch_model-{len(names) + 1:05d}.safetensors")
            save_file(part, folder / "transformer" / names[-1])
            places |= dict.fromkeys(part, names[-1])
            part, size = {}, 0
        if name is not None:
            repeats = -(-tensor.numel() // len(values))
            part[name] = values.repeat(repeats)[: tensor.numel()].reshape(tensor.shape).contiguous()
            size += 2 * tensor.numel()
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def memory(name: str, file: str = "status") -> int:
    """A number of bytes from a file of /proc/self."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


class Peak(threading.Thread):
    """Polls the anonymous memory of this process. `highest` is its highest value in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.highest = max(self.highest, memory("RssAnon"))


def load(path: str, case: str) -> dict[str, Any]:
    """Load the model in this process, and return what it took."""
    from flowgrain.config import load_config
    from flowgrain.distributed import init_process_group
    from flowgrain.distributed.sharding import local_tensor
    from flowgrain.training import load as loading
    from flowgrain.training.copies import make_copies

    changes = {"model.name": "sd3", "model.path": path, "rewards": ["clip"], **CASES[case]}
    changes |= {"runtime.device": "cpu", "runtime.threads": 1, "method.kl_weight": 0.0}
    changes |= {"runtime.dtype": "float32" if case == "full, sharded" else "bfloat16"}
    config = load_config("flow_grpo", {**changes, "optimizer.learning_rate": 1e-4})
    device = torch.device("cpu")
    world = init_process_group(device)
    dtype = loading.compute_dtype(config.runtime.dtype, device)
    pss = memory("Pss", "smaps_rollup")
    before, peak = memory("RssAnon"), Peak()
    peak.start()
    # Earlier versions load the whole model.
    backbone = getattr(loading, "load_empty", loading.load_model)(config)
    copies = make_copies(config, backbone, device, dtype, world)
    peak.stopped.set()
    peak.join()
    held, largest = {}, 0
    for module in copies.distinct():
        for tensor in [*module.parameters(), *module.buffers()]:
            local = local_tensor(tensor.detach())
            is_file = module.dtype == torch.bfloat16 and case == "LoRA" and not tensor.requires_grad
            largest = max(largest, local.numel() * local.element_size())
            if not is_file and not (local.ndim == 3 and local.dtype == torch.bfloat16):
                held[local.data_ptr()] = local.numel() * local.element_size()
    world.gather(None)  # all processes have loaded
    found = {
        "anonymous": max(peak.highest, memory("RssAnon")) - before,
        "expected": sum(held.values()) + largest,
        "pss": memory("Pss", "smaps_rollup") - pss,
    }
    world.gather(None)  # all processes have measured
    for module in copies.distinct():
        for tensor in module.parameters():
            local_tensor(tensor.detach()).flatten()[::1024].sum()  # at most 4 KB apart: every page
    world.gather(None)
    found["read"] = memory("Pss", "smaps_rollup") - pss
    return world.gather(found)


def run_rank(rank: int, path: Path, case: str, processes: int, port: int, results: Any) -> None:
    """`load` as a rank of a new process group."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    values |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in values.items()}
    found = load(str(path), case)
    if rank == 0:
        results.send(found)
    os._exit(0)


def import_libraries() -> None:
    """Import what loading needs, before the processes are forked."""
    import peft  # noqa: F401

    import flowgrain.training.copies  # noqa: F401
    from flowgrain.models import BACKBONES

    BACKBONES.get("sd3")


def measure(path: Path, case: str, processes: int) -> list[dict[str, int]]:
    """What `load` found in each of `processes` processes, which are forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (path, case, processes, port, sender)
    ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    sender.close()
    found = receiver.recv()
    for rank in ranks:
        rank.join()
    return found


def main() -> None:
    """Write the model, measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--cases", default=";".join(CASES))
    parser.add_argument("--path", type=Path, help="directory of an earlier call, which is kept")
    options = parser.parse_args()
    import_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        path = options.path or Path(temporary)
        if not (path / "model_index.json").exists():
            # In another process, because this one would keep the freed memory.
            writer = multiprocessing.Process(target=write_pipeline, args=(path, options.layers))
            writer.start()
            writer.join()
        size = sum(f.stat().st_size for f in (path / "transformer").iterdir())
        print(f"{size / 1e9:.2f} GB in the files of the transformer. GB per process:")
        columns = ("anonymous", "expected", "pss", "read")
        print("| case | processes |", " | ".join(columns), "|")
        for case in options.cases.split(";"):
            for processes in map(int, options.processes.split(",")):
                found = measure(path, case, processes)
                highest = [max(rank[name] for rank in found) / 1e9 for name in columns]
                print(
                    f"| {case} | {processes} |",
                    " | ".join(f"{v:.2f}" for v in highest),
                    "|",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Directories of runs for tests and measurements, written without torch.

write_run(folder)                         # a run with everything
write_runs(folder, 200, steps=50)         # many runs, each with other numbers
python tests/records/fake_runs.py DIR --runs 200 --group-steps 10 --leaves 25
"""

import argparse
import json
import math
import os
import socket
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from flowgrain.records.evaluations import write_evaluation_images
from flowgrain.records.group_files import group_name, write_group
from flowgrain.records.groups import GroupRecord, GroupTree, PromptGroup
from flowgrain.records.json_text import to_json

TEXTS = (
    "three green circles",
    "a red square left of a blue triangle",
    'two towers <b>at night</b> & a "moon"',  # a page must escape it
    "a yellow star above a green circle",
)
MONITORS = ("edge_density", "colorfulness", "diversity")
NUM_STEPS = 8


def write_runs(folder, count, **options):
    """Write `count` runs into `folder`. Returns their directories."""
    paths = [Path(folder) / f"run-{number:03d}" for number in range(count)]
    for number, path in enumerate(paths):
        write_run(path, seed=number, **options)
    return paths


def write_run(
    folder,
    *,
    seed=0,
    steps=20,
    max_steps=None,
    method="flow_grpo",
    rewards=("towers", "oracle"),
    group_steps=4,
    prompts=2,
    leaves=6,
    size=32,
    thumbnail=160,
    evaluations=3,
    images=8,
    monitors=True,
    alarms=1,
    running=False,
):
    """Write the directory of a run, as training writes it. Returns `folder`.

    Args:
        folder: its directory.
        seed: determines all numbers.
        steps: finished training steps.
        max_steps: last step of a complete run. Default: `steps`, a finished run.
        method: name of the method.
        rewards: names of the rewards.
        group_steps: number of recorded training steps.
        prompts: recorded prompts of a step. One more prompt has numbers only.
        leaves: images of a prompt.
        size: height and width of an image in pixels.
        thumbnail: largest size of a thumbnail.
        evaluations: number of evaluations, the first before training.
        images: recorded images of an evaluation.
        monitors: whether there are monitors.
        alarms: number of alarms.
        running: whether this process counts as training the run.
    """
    folder = Path(folder)
    for part in ("groups", "evaluations", "checkpoints"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    _write_yaml(folder, seed, max_steps or steps, method, rewards)
    evaluated = _spread(0, steps, evaluations)
    names = MONITORS if monitors else ()
    lines = []
    for step in range(steps + 1):
        if step or step in evaluated:
            lines.append(_metrics(rng, step, rewards, names, step in evaluated))
    (folder / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in lines))
    for step in evaluated:
        _write_evaluation(folder, rng, step, rewards, names, images, size)
    for step in _spread(1, steps, group_steps):
        _write_group(folder, step, method, rewards, names, prompts, leaves, size, thumbnail, rng)
    _write_alarms(folder, evaluated, alarms)
    if running:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        }
        (folder / ".lock.json").write_text(json.dumps(holder))
    return folder


def picture(size, number, step=0):
    """An image [size, size, 3] of a shape on a gradient, another one for every number."""
    return np.roll(_base(size), (number * 7 + step) % size, axis=1) ^ np.uint8(number * 37 % 128)


@cache
def _base(size):
    y, x = np.mgrid[:size, :size] / size
    circle = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.08
    colors = np.stack([x, y, np.where(circle, 0.9, 0.2)], axis=-1)
    return (colors * 255).astype(np.uint8)


def _spread(first, last, count):
    """`count` steps from `first` to `last`, evenly spaced, both included."""
    return sorted({round(step) for step in np.linspace(first, last, count)}) if count else []


def _write_yaml(folder, seed, max_steps, method, rewards):
    config = {
        "name": folder.name,
        "method": {"name": method, "group_size": 6, "clip_range": 1e-4},
        "model": {"name": "shapes", "path": None, "height": 512, "width": 512},
        "lora": {"rank": 0},
        "sampling": {"num_steps": NUM_STEPS, "guidance_scale": 1.0},
        "rewards": [{"name": name, "weight": 1.0, "batch_size": 256} for name in rewards],
        "optimizer": {"learning_rate": 1.5e-4 * (1 + seed % 3)},
        "training": {"max_steps": max_steps, "max_seconds": None, "prompts_per_step": 3},
        "evaluation": {"every": 10, "num_steps": 16, "num_prompts": 12, "rewards": []},
        "data": {"prompts": None},
        "runtime": {"seed": seed, "trackers": []},
    }
    record = {
        "config": config,
        "given": [],
        "versions": {"flowgrain": "0.2.0", "torch": "2.11.0"},
        "python": "3.12.0",
        "threads": 1,
        "git_revision": None,
        "history": [],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


def _metrics(rng, step, rewards, monitors, evaluated):
    progress = 1 - math.exp(-step / 20)
    line = {"step": step}
    if step:
        line |= {"loss": float(rng.normal(0, 0.01)), "ratio/mean": 1.0, "ratio/max": 1.01}
        line |= {"clip_fraction": float(rng.uniform(0, 0.2)), "kl": float(rng.uniform(0, 0.01))}
        line |= {"grad_norm": float(rng.uniform(0.01, 0.1)), "updates": 1, "updates/skipped": 0}
        for name in rewards:
            line[f"reward/{name}"] = 0.3 + 0.4 * progress + float(rng.normal(0, 0.02))
            line[f"failed/{name}"] = 0
        line |= {f"monitor/{name}": float(rng.uniform(0, 1)) for name in monitors}
        line |= {"advantage/std": float(rng.uniform(0.9, 1.1)), "advantage/zero": 0.0}
        line |= {"forward_passes": 960, "train_forward_passes": 64, "decodes": 96}
        parts = {"sample": 1.2, "decode": 0.4, "score": 0.1, "update": 0.3}
        line |= {f"seconds/{name}": value * rng.uniform(0.9, 1.1) for name, value in parts.items()}
        line["seconds"] = 2.1 + float(rng.uniform(0, 0.2))
    if evaluated:
        line |= {f"eval/{name}": 0.35 + 0.4 * progress for name in rewards}
        line |= {f"eval/monitor/{name}": 0.5 - 0.2 * progress for name in monitors}
    return line


def _write_evaluation(folder, rng, step, rewards, monitors, images, size):
    count, progress = max(images, 12), 1 - math.exp(-step / 20)

    def scores():
        return np.clip(rng.normal(0.35 + 0.4 * progress, 0.1, count), 0, 1).tolist()

    names = [*rewards, *monitors]
    base = {"mean": 0.4 * progress, "low": 0.4 * progress - 0.05, "high": 0.4 * progress + 0.05}
    values = {
        "step": step,
        "num_steps": 16,
        "prompts": [TEXTS[place % len(TEXTS)] for place in range(count)],
        "scores": {name: scores() for name in rewards},
        "parts": {f"{rewards[0]}/missing": 0.2 - 0.1 * progress},
        "monitors": {name: [math.nan, *scores()[1:]] for name in monitors},
        **({"base": {name: {**base, "std": 0.1} for name in names}} if step else {}),
    }
    evaluations = folder / "evaluations"
    (evaluations / f"step-{step:06d}.json").write_text(to_json(values))
    shown = (picture(size, place, step) for place in range(images))
    write_evaluation_images(evaluations, step, shown)


def _tree(leaves, credited_leaves):
    """Two noises, each with stochastic steps that branch once into half of the leaves."""
    parent, index, stochastic, ends = [], [], [], []
    for root in range(min(2, leaves)):
        parent.append(-1)
        index.append(0)
        stochastic.append(False)
        fork = len(parent) - 1
        for _ in range(leaves // 2 if root else leaves - leaves // 2):
            row = fork
            for step in range(1, NUM_STEPS + 1):
                parent.append(row)
                index.append(step)
                stochastic.append(step == 1)
                row = len(parent) - 1
            ends.append(row)
    edges = ends if credited_leaves else [row for row, is_sde in enumerate(stochastic) if is_sde]
    return GroupTree(parent, index, stochastic, ends, ends, [0] * len(ends), edges)


def _write_group(folder, step, method, rewards, monitors, prompts, leaves, size, thumbnail, rng):
    tree = _tree(leaves, credited_leaves=method == "diffusionnft")
    groups = []
    for number in range(prompts + 1):
        recorded = number < prompts
        scores = {name: np.clip(rng.normal(0.5, 0.2, leaves), 0, 1).tolist() for name in rewards}
        if number == 0:
            scores[rewards[-1]][0] = math.nan  # a reward failed
        values = {name: rng.uniform(0, 1, leaves).tolist() for name in monitors}
        mean = np.nan_to_num(np.array(scores[rewards[0]]), nan=0.5)
        advantage = ((mean - mean.mean()) / (mean.std() + 1e-8)).tolist()
        best = sorted({int(np.argmax(mean)), int(np.argmin(mean))}) if recorded else []
        text = TEXTS[(step + number) % len(TEXTS)]
        groups.append(PromptGroup(text, recorded, scores, values, advantage, best))
    record = GroupRecord(
        step=step,
        method=method,
        num_steps=NUM_STEPS,
        sigmas=np.linspace(1, 0, NUM_STEPS + 1).tolist(),
        tree=tree,
        rewards=list(rewards),
        reward_weights=dict.fromkeys(rewards, 1.0),
        image_size=[size, size],
        prompts=groups,
        path=folder / "groups" / group_name(step),
    )
    images = {(p, i): picture(size, i, step + p) for p in range(prompts) for i in range(leaves)}
    write_group(record, images, thumbnail)


def _write_alarms(folder, evaluated, alarms):
    lines = [
        {
            "step": step,
            "monitor": MONITORS[0],
            "direction": "down",
            "difference": -0.31,
            "low": -0.4,
            "high": -0.2,
            "threshold": 0.1,
            "evaluations": 2,
            "action": "warn",
            "message": f"edge_density fell at step {step}",
        }
        for step in evaluated[1:][:alarms]
    ]
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "alarms.jsonl").write_text(text)


def main():
    parser = argparse.ArgumentParser(description="Write runs for measurements.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--group-steps", type=int, default=10)
    parser.add_argument("--leaves", type=int, default=25)
    arguments = parser.parse_args()
    write_runs(
        arguments.folder,
        arguments.runs,
        steps=arguments.steps,
        group_steps=arguments.group_steps,
        leaves=arguments.leaves,
    )


if __name__ == "__main__":
    main()

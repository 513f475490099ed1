"""Does the watch raise its alarm in a run that games its reward, and stay quiet in honest runs?

    python benchmarks/watch.py [--out runs/watch] [--only NAME] [--seed SEED] [--cost]

Trains a run on the bundled model that games the reward `preference`, and honest runs of several
methods, all with the default settings of `watch` and without `oracle` among the evaluated rewards.
The oracle, an exact check of the image, is computed beside the runs. It judges, and raises nothing.

Writes OUT/results.json: for every run the alarms, and for every evaluation the trained reward, the
oracle with the paired difference to the base model, and the differences of all monitors. A
finished run is not trained again; its alarms are computed again from its records.

With --cost, it writes OUT/cost.json instead: the share of a training step and of an evaluation of
the demo that the monitors take, as medians over rounds in one process.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from flowgrain.config import load_config
from flowgrain.monitors import pixels
from flowgrain.rewards import score
from flowgrain.rewards.shapes import Oracle
from flowgrain.statistics import confidence_interval
from flowgrain.training import Trainer
from flowgrain.training.alarms import differences, find
from flowgrain.training.evaluate import evaluation_noise, sample
from flowgrain.training.loop import evaluate_and_record
from flowgrain.training.step import train_step
from flowgrain.training.watch_files import read_measured

COMMON = {
    "method.group_size": 12,
    "method.kl_weight": 0.0,
    "sampling.num_steps": 8,
    "training.prompts_per_step": 4,
    "training.ema_decay": 0.9,
    "evaluation.every": 4,
    "evaluation.num_prompts": 128,
    "evaluation.num_steps": 10,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}
"""Settings of the comparison in docs/results/comparison.md, with more evaluations."""
ONE_UPDATE = {"method.updates_per_rollout": 1}
WINDOW = {"method.window_size": 2, "method.window_interval": 4, "method.reward_weights": "as_given"}
CASES = {
    "hacks": ("diffusionnft", ["towers", "preference"], 3e-4, 16, {}),
    "g2rpo-towers": ("g2rpo", ["towers"], 3e-4, 20, {}),
    "mixgrpo-towers": ("mixgrpo", ["towers"], 1e-4, 72, {**WINDOW, **ONE_UPDATE}),
    "tempflow-towers": ("tempflow_grpo", ["towers"], 1e-4, 24, {**ONE_UPDATE, "method.seeds": 1}),
    "diffusionnft-oracle": ("diffusionnft", ["oracle"], 3e-4, 24, {}),
    "g2rpo-oracle": ("g2rpo", ["oracle"], 3e-4, 20, {}),
}
"""Method, trained rewards, learning rate, training steps and other settings of every run."""
LOSS = 0.02
"""Loss of the oracle before which an alarm should have been raised."""
JUDGED = 302
"""Images for the oracle: every held-out prompt."""


def train(name: str, folder: Path, seed: int) -> None:
    """Train the run `name`, and write the scores of the oracle to judge.jsonl."""
    method, rewards, rate, steps, changes = CASES[name]
    own = {"rewards": rewards, "optimizer.learning_rate": rate, "training.max_steps": steps}
    own["runtime.seed"] = seed
    every = 12 if steps > 60 else 1 if name == "hacks" else 4
    config = load_config(method, {**COMMON, **changes, **own, "evaluation.every": every})
    trainer, oracle = Trainer(config, folder), Oracle()
    (folder.parent / f"{name}.judge.jsonl").unlink(missing_ok=True)

    def judge(step: int) -> None:
        prompts = [trainer.eval_prompts[i % len(trainer.eval_prompts)] for i in range(JUDGED)]
        noise = evaluation_noise(trainer.backbone.latent_shape, 1, range(JUDGED))
        texts = [prompt.text for prompt in prompts]
        with trainer.policy.averaged():
            images = sample(trainer.policy, texts, noise, config.sigmas(10), 1.0, 128).images
        values = score(oracle, images, prompts).values
        with (folder.parent / f"{name}.judge.jsonl").open("a") as file:
            line = {"step": step, "oracle": [round(float(v), 4) for v in values]}
            file.write(json.dumps(line) + "\n")

    def progress(metrics) -> None:
        if metrics["step"] % every == 0 or metrics["step"] == steps:
            judge(metrics["step"])
            print(name, metrics["step"], metrics.get("alarms"), flush=True)

    trainer.train(progress, start=lambda: judge(0))


def result(name: str, folder: Path) -> dict:
    """The alarms of a run by the current rule, and its numbers at every evaluation."""
    method, rewards, rate, _, _ = CASES[name]
    config = load_config(folder)
    lines = (folder.parent / f"{name}.judge.jsonl").read_text().splitlines()
    judged = {line["step"]: np.array(line["oracle"]) for line in map(json.loads, lines)}
    base = read_measured(folder, 0, config.eval_guidance)
    weights, rows, first = config.reward_weights, [], None
    for step in sorted(judged)[1:]:
        now = read_measured(folder, step, config.eval_guidance)
        findings = find(base, now, weights, load_config(method).watch)
        oracle = confidence_interval(judged[step] - judged[0])
        if findings and first is None:
            first = step
        rows.append(
            {
                "step": step,
                "alarms": [rounded(dataclasses.asdict(finding)) for finding in findings],
                "oracle": rounded(dataclasses.asdict(oracle)),
                "differences": {
                    key: rounded(dataclasses.asdict(value))
                    for key, value in differences(base, now).items()
                },
            }
        )
    lost = next((row["step"] for row in rows if row["oracle"]["mean"] <= -LOSS), None)
    return {
        "method": method,
        "rewards": rewards,
        "learning_rate": rate,
        "oracle_of_base": round(float(judged[0].mean()), 4),
        "first_alarm": first,
        "oracle_lost_at": lost,
        "evaluations": rows,
    }


def cost(folder: Path, rounds: int = 5) -> dict:
    """Medians of seconds in one process: the demo's step and evaluation, and their monitors."""
    trainer = Trainer(load_config("demo", {"runtime.threads": 1}), folder)
    trainer.recorder.start()
    images_of_run = trainer.config.evaluation.images_of_run
    evaluate_and_record(trainer, 0)  # records the base model
    seconds = defaultdict(list)
    for number in range(1, rounds + 1):
        begin = time.perf_counter()
        _, batch = train_step(number, trainer.config, trainer.collector, trainer.optimizer)
        seconds["step"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        latents = batch.rollout.at(batch.rollout.tree.leaves)
        for images, part in zip(batch.images.split(128), latents.split(128), strict=True):
            pixels.measure(images)
            part.flatten(1).square().mean(1).sqrt()
        seconds["monitors_of_step"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        evaluation = trainer.evaluate(num_images=images_of_run)
        seconds["evaluation"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for images in evaluation.images.split(512):
            pixels.measure(images)
        trainer.watch.net(evaluation.images)
        trainer.watch.judge(number, trainer.watch.measure(number, evaluation))
        seconds["monitors_of_evaluation"].append(time.perf_counter() - begin)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    every = trainer.config.evaluation.every
    monitors = found["monitors_of_step"] + found["monitors_of_evaluation"] / every
    whole = found["step"] + found["evaluation"] / every
    return rounded(found) | {
        "evaluation_every": every,
        "share_of_step": round(found["monitors_of_step"] / found["step"], 5),
        "share_of_evaluation": round(found["monitors_of_evaluation"] / found["evaluation"], 5),
        "share_of_run": round(monitors / whole, 5),
    }


def rounded(values: dict) -> dict:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/watch"))
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cost:
        with TemporaryDirectory() as folder:
            text = json.dumps(cost(Path(folder)), indent=1)
        (args.out / "cost.json").write_text(text)
        print(text)
        return
    for name in [args.only] if args.only else CASES:
        if not (args.out / name / "finished").exists():
            train(name, args.out / name, args.seed)
            (args.out / name / "finished").touch()
    finished = [name for name in CASES if (args.out / name / "finished").exists()]
    results = {name: result(name, args.out / name) for name in finished}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    for name, values in results.items():
        last = values["evaluations"][-1]["oracle"]
        print(
            f"{name:22} first alarm {values['first_alarm']}, oracle lost {LOSS} at "
            f"{values['oracle_lost_at']}, oracle at the end {last['mean']:+.3f}"
        )


if __name__ == "__main__":
    main()

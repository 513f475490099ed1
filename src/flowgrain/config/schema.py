"""The settings of a run: one typed, strict object. An unknown key is an error that names the nearest valid one."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from flowgrain.core.credit import Mix, Peers, Scope
from flowgrain.core.objective import KLForm
from flowgrain.core.sde import sigma_grid
from flowgrain.core.tree import CoarseGrid, Tails

NoiseKind = Literal["flow_sde", "dance_sde", "cps", "calibrated_sde"]
WindowSchedule = Literal["progressive", "random", "decay", "exp_decay", "frozen"]

_FLOW_GRPO: dict[str, Any] = {
    "num_steps": 10,
    "group_size": 24,
    "std_scope": "global",
    "std_unbiased": False,
    "std_epsilon": 1e-4,
    "reward_mix": "reward",
    "updates_per_rollout": 2,
    "kl_weight": 0.04,
}
_MIXGRPO: dict[str, Any] = {"num_steps": 25, "shared_noise": True, "window_size": 4}

PAPER: dict[str, dict[str, Any]] = {
    "g2rpo": {"granularities": (1, 2, 3)},
    "densegrpo": {
        **_FLOW_GRPO,
        "noise": "calibrated_sde",
        "std_scope": "group",
        "std_unbiased": True,
        "updates_per_rollout": 1,
        "calibration_rounds": 20,
    },
    "flow_grpo": _FLOW_GRPO,
    "flow_grpo_fast": {**_FLOW_GRPO, "window_size": 2, "window_schedule": "random", "window_region": "first_half"},
    "dancegrpo": {"noise": "dance_sde", "eta": 0.3, "shared_noise": True, "timestep_fraction": 0.6},
    "mixgrpo": _MIXGRPO,
    "mixgrpo_flash": {**_MIXGRPO, "tail_order": 2, "tail_ratio": 0.4},
    "mixgrpo_flash_star": {**_MIXGRPO, "tail_order": 2, "tail_ratio": 0.2, "window_schedule": "frozen"},
    "tempflow_grpo": {**_FLOW_GRPO, "group_size": 6, "std_scope": "group", "updates_per_rollout": 1},
    "grpo_guard": _FLOW_GRPO,
    "branchgrpo": {"num_steps": 20, "group_size": 16, "std_epsilon": 1e-4},
    "diffusionnft": {
        **_FLOW_GRPO,
        "updates_per_rollout": 1,
        "kl_weight": 1e-4,
        "tail_order": 2,
        "timestep_fraction": 0.99,
    },
}
"""What each method's paper sets, where methods differ (sources in docs/). Whatever a recipe or user says goes before it."""

_WINDOWED = ("mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star", "flow_grpo_fast")
_FAN_OUT = ("g2rpo", "tempflow_grpo", "branchgrpo")  # one trunk: there is no choice of initial noises
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "granularities": ("g2rpo",),
    "coarse_grid": ("g2rpo",),
    "anchor_image": ("g2rpo",),
    "sde_steps": tuple(m for m in PAPER if m not in (*_WINDOWED, "diffusionnft")),
    "noise": tuple(m for m in PAPER if m != "diffusionnft"),
    "shared_noise": tuple(m for m in PAPER if m not in (*_FAN_OUT, "diffusionnft")),
    "timestep_fraction": ("dancegrpo", "diffusionnft"),
    "window_size": _WINDOWED,
    "window_stride": _WINDOWED,
    "window_interval": _WINDOWED,
    "window_schedule": _WINDOWED,
    "window_region": _WINDOWED,
    "window_end": _WINDOWED,
    "tail_ratio": tuple(m for m in PAPER if m not in ("g2rpo", "densegrpo")),  # those have granularities, look_steps
    "look_steps": ("densegrpo",),
    "dense_reward": ("densegrpo",),
    "split_steps": ("branchgrpo",),
    "split_fan": ("branchgrpo",),
    "nft_beta": ("diffusionnft",),
    "nft_max_decay": ("diffusionnft",),
    "nft_decay_rate": ("diffusionnft",),
    "eta": tuple(m for m in PAPER if m != "diffusionnft"),
    "kl_form": tuple(m for m in PAPER if m != "diffusionnft"),
    "clip_range": tuple(m for m in PAPER if m != "diffusionnft"),
    "peers": tuple(m for m in PAPER if m != "diffusionnft"),
    "best_of": tuple(m for m in PAPER if m != "diffusionnft"),
}
"""Settings that mean something to some methods alone. Elsewhere they must stay as they are: nothing is silently ignored."""


def canonical(method: str) -> str:
    """The name of a method as this package writes it: DanceGRPO, dance-grpo and dance_grpo are dancegrpo."""
    plain = re.sub(r"[-_ ]", "", method.lower())
    return next((name for name in PAPER if name.replace("_", "") == plain), method)


FIXED = (
    "model",
    "method",
    "seed",
    "num_steps",
    "shift",
    "lora_rank",
    "lora_alpha",
    "noise",
    "psi",
    "dtype",
    "vae_dtype",
    "encoder_dtype",
    "prompts",
)
"""Settings that a resumed run must keep: with another value it would be another run."""


class SettingsError(ValueError):
    """A setting that cannot be: the message names the setting, its value and what would be right."""


def _listed(value: Any) -> Any:
    """1,2,3 and a lone 1 as lists, as they are written on the command line."""
    if isinstance(value, str):
        return [part for part in re.split(r"[,\s]+", value.strip("[]() ")) if part]
    return [value] if isinstance(value, int | float) else value


def _number(value: Any) -> Any:
    """A whole number as it is written on the command line; a Literal takes no text for one."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


IntList = Annotated[tuple[int, ...], BeforeValidator(_listed)]
FloatList = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _weights(value: Any) -> Any:
    """oracle, oracle:1,clip:0.5 and ["oracle", "clip"] as {name: weight}. One's own reward is package.module:function."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if isinstance(value, list | tuple):
        weights = {}
        for part in value:
            name, _, weight = str(part).rpartition(":")
            numeric = bool(name) and re.fullmatch(r"[-+.\deE]+", weight) is not None
            name = name if numeric else str(part)
            if name in weights:
                raise ValueError(f"names {name} twice; give it once")
            weights[name] = float(weight) if numeric else 1.0
        return weights
    return value


def _named(value: Any) -> Any:
    """a=x,b=y as {a: x, b: y}."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part]
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"names {max(names, key=names.count)} twice; give it once")
    return {name: rest for name, _, rest in pairs}


class Settings(BaseModel):
    """Everything that determines a run. Fields that a method's paper sets (see PAPER) default to the paper's value.

    Example: Settings(method="g2rpo", granularities=(1, 2, 3), learning_rate=3e-4, max_steps=60)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    name: str = Field("run", min_length=1, pattern=r"^[\w.+-]+$", description="the run's folder is runs/<name>")
    method: str = Field("g2rpo", description=", ".join(PAPER))
    model: str = Field(
        "shapes",
        description="the backbone: shapes (bundled), sd3 (SD3 and SD3.5), flux (FLUX.1), flux2 (FLUX.2-klein), qwen_image, zimage",
    )
    weights: str | None = Field(None, description="folder or hub name of a diffusers pipeline")
    revision: str | None = Field(None, description="of a hub name")
    height: int = Field(512, ge=8, description="pixels")
    width: int = Field(512, ge=8, description="pixels")
    max_prompt_tokens: int = Field(256, ge=1, description="length to which prompts are encoded")
    t5: bool = Field(True, description="SD3: encode with T5 too; without it prompts have CLIP's 77 tokens")
    long_prompts: Literal["refuse", "cut"] = Field("refuse", description="what becomes of a prompt with more tokens")
    embedding_cache: str | None = Field(None, description="folder in which prompt embeddings are kept for the next run")
    vae_tiling: bool = Field(False, description="decode large images piece by piece")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    attention_backend: str | None = Field(None, description="as diffusers names them: native, flash, ...")
    compile: Literal["inductor", "aot_eager"] | None = Field(
        None, description="backend of torch.compile for the repeated blocks; short passes are then filled up, not compiled anew"
    )
    seed: int = Field(0, ge=0, description="all randomness of the run follows from it")

    # the grid and the tree
    num_steps: int = Field(16, ge=2, le=1000, description="T, sampling steps while training")
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        3.0, description="timestep shift of the noise grid; auto: as the model's own pipeline computes it"
    )
    shift_terminal: float | None = Field(
        None, gt=0, lt=1, description="noise level at which the last step begins; the grid is stretched to it (Qwen-Image)"
    )
    group_size: int = Field(12, ge=2, description="G, samples that are compared with each other")
    sde_steps: IntList | None = Field(None, description="M, grid indices with noise and training; default: see the method")
    granularities: IntList = Field((1,), description="Lambda, strides at which every branch is finished")
    coarse_grid: CoarseGrid = Field("stride", description="stride (the published code's grid) or exact")
    anchor_image: bool = Field(True, description="also decode and score the anchor's own image")
    noise: NoiseKind = Field("flow_sde", description="kernel of the stochastic steps; calibrated_sde has a strength a step, psi")
    eta: float = Field(0.7, gt=0, description="noise strength of the stochastic steps")
    shared_noise: bool = Field(False, description="one initial noise for the whole group, or one each")
    timestep_fraction: float = Field(1.0, gt=0, le=1, description="share of the steps trained, drawn at random every rollout")
    window_size: int = Field(0, ge=0, description="w, stochastic steps in MixGRPO's sliding window")
    window_stride: int = Field(1, ge=1, description="grid steps the window moves on")
    window_interval: int = Field(25, ge=1, description="tau, training steps between two moves")
    window_schedule: WindowSchedule = Field("progressive", description="how the window moves; frozen: it stays at the start")
    window_region: Literal["all", "first_half"] = Field("all", description="the part of the grid that the window visits")
    window_end: Literal["roll_back", "stay"] = Field("roll_back", description="after the last position: back to the start, or stay")
    tail_order: Annotated[Literal[1, 2], BeforeValidator(_number)] = Field(
        1, description="2: second-order multistep ODE steps (DPM-Solver++ 2M) after the last stochastic one"
    )
    tail_ratio: float = Field(1.0, gt=0, le=1, description="share of the steps after the last stochastic one that are taken")
    tail_cache: str = Field(
        "none",
        pattern=r"^(none|first_block:0?\.\d+|taylorseer:[2-9])$",
        description="features that these steps take from earlier ones, by diffusers: none, first_block:THRESHOLD (.05 to .2), "
        "or taylorseer:INTERVAL (of whole steps)",
    )
    tail_weights: Literal["same", "int8", "float8"] = Field(
        "same", description="weights of these steps: the policy's own, or a copy quantised by torchao, activations too"
    )
    look_steps: int | Literal["all"] = Field("all", description="ODE steps of a look from a state: all of the grid's rest, or n")
    dense_reward: Literal["gain", "state"] = Field("gain", description="a step earns R_next - R, or R_next itself")
    split_steps: IntList = Field((0, 3, 6, 9), description="grid steps at which BranchGRPO's tree splits")
    split_fan: int = Field(2, ge=2, description="children of a split")

    # noise calibrated on the base policy (DenseGRPO)
    psi: FloatList | None = Field(None, description="noise strength of every step; default: calibrated before the first step")
    calibration_rounds: int = Field(0, ge=0, description="rounds of calibration, each moves psi by calibration_step")
    calibration_samples: int = Field(64, ge=2, description="N, trajectories of a round, each of its own prompt")
    calibration_step: float = Field(0.01, gt=0)
    calibration_balance: float = Field(0.25, gt=0, le=1, description="|#pos - #neg| / N below which a step counts as balanced")

    # rewards and credit
    rewards: Annotated[dict[str, float], BeforeValidator(_weights)] = Field(
        {"oracle": 1.0}, min_length=1, description="name:weight; names of bundled rewards or package.module:function"
    )
    reward_mix: Mix = Field("advantage", description="several rewards: sum of advantages, or of rewards")
    std_scope: Scope = Field("group", description="whose std divides: of the group, or global (of the batch)")
    std_unbiased: bool = True
    std_epsilon: float = Field(1e-8, gt=0)
    peers: Peers = Field("step", description="compare edges of one step of a prompt, or all edges of the prompt jointly")
    best_of: int = Field(0, ge=0, description="train only the best and worst best_of / 2 of every group; 0: all")
    advantage_clip: float = Field(5.0, gt=0)
    reward_models: Annotated[dict[str, str], BeforeValidator(_named)] = Field(
        {}, description="weights of a reward: clip=FOLDER,hps=FOLDER#CHECKPOINT; default: its hub name"
    )
    reward_device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where reward models run: cpu, cuda or cuda:1")
    judge_template: Annotated[dict[str, str], BeforeValidator(_named)] = Field(
        {}, description="file with the question to a judge: unifiedreward=FILE; {prompt} stands for the prompt"
    )
    reward_pickles: bool = Field(False, description="read the tensors of pickled reward checkpoints")
    reward_batch: int = Field(256, ge=1, description="images of one reward call")
    max_failed_rewards: float = Field(0.2, ge=0, le=1, description="share of failed rewards in a step at which the run stops")

    # the update
    max_steps: int = Field(100, ge=1, description="rollouts; each is followed by its updates")
    max_seconds: float | None = Field(None, gt=0, description="training ends early after the step that uses this up")
    prompts_per_step: int = Field(24, ge=1)
    updates_per_rollout: int | Literal["per_step"] = Field(1, description="optimizer steps a rollout, or one for each SDE step")
    clip_range: float = Field(1e-4, gt=0)
    kl_weight: float = Field(0.0, ge=0, description="beta, weight of the KL to the reference")
    kl_form: KLForm = Field("gaussian", description="the exact KL, or flow_grpo's published variant")
    nft_beta: float = Field(1.0, gt=0, description="DiffusionNFT: how far v+ and v- stand from the old velocity")
    nft_max_decay: float = Field(0.5, ge=0, lt=1, description="DiffusionNFT: most that the old policy keeps of itself a step")
    nft_decay_rate: float = Field(0.001, ge=0, description="DiffusionNFT: the old policy keeps min(rate * step, max_decay)")
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    adam_betas: Annotated[tuple[Beta, Beta], BeforeValidator(_listed)] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_updates: int = Field(3, ge=1, description="non-finite updates in a row at which the run stops")

    # the policy
    lora_rank: int = Field(0, ge=0, description="0: full fine-tune")
    lora_alpha: float | None = Field(None, gt=0, description="default: twice the rank")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="0: no EMA; evaluation and export use the EMA weights if there are any")
    ema_every: int = Field(1, ge=1, description="updates between two EMA updates")
    guidance_scale: float = Field(1.0, ge=0, description="true CFG while training; 1 is without")
    eval_guidance_scale: float | None = Field(None, ge=0, description="default: as in training")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the sampling and of the gradient's forward")
    vae_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the image decoder; auto: float32")
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the text encoders; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's choice, or of several processes each its share of the cores")
    prompts_per_rollout: int | None = Field(
        None, ge=1, description="prompts sampled together, while the rewards of those before are computed; default: all at once"
    )
    rollout_weights: Literal["auto", "replica", "sharded"] = Field(
        "auto",
        description="several processes: sample with a whole copy in each, or through sharded weights; auto: as memory allows",
    )
    rows_per_pass: int = Field(128, ge=1, description="rows of one model call while sampling")
    train_rows_per_pass: int | None = Field(None, ge=1, description="rows of one gradient forward; default: rows_per_pass")

    # prompts and evaluation
    prompts: str | None = Field(
        None, description="file of prompts, .txt (a line each), .jsonl or .csv; default: the model's own training prompts"
    )
    eval_prompts_file: str | None = Field(None, description="held-out prompts, a line each; default: see eval_split")
    eval_prompts: int = Field(256, ge=1, description="how many held-out prompts are sampled (noise differs on repeats)")
    eval_split: Literal["held-out", "validation"] = Field(
        "held-out", description="which of the model's own prompts: settings are chosen on validation, results told on held-out"
    )
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: never")
    eval_num_steps: int = Field(16, ge=1)
    eval_rewards: tuple[str, ...] | None = Field(None, description="default: the trained rewards and all bundled ones")

    # files
    checkpoint_every: int = Field(10, ge=0, description="steps between checkpoints; 0: only the last")
    keep_checkpoints: int = Field(2, ge=1, description="the last N are kept, and the best")
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @field_validator("eval_rewards", "loggers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("updates_per_rollout")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if value != "per_step" and int(value) < 1:
            raise ValueError("must be at least 1, or per_step")
        return value

    def grid(self, num_steps: int | None = None) -> Tensor:
        """The noise levels of `num_steps` steps, of training's by default. Before the model is loaded, 3 stands for shift=auto:
        what a plan costs does not depend on it."""
        return sigma_grid(num_steps or self.num_steps, 3.0 if self.shift == "auto" else self.shift, self.shift_terminal)

    def with_natural_shift(self, shift: float, terminal: float | None) -> "Settings":
        """These settings with the model's own grid in place of shift=auto; a terminal that was set stays."""
        return self.model_copy(update={"shift": shift, "shift_terminal": self.shift_terminal or terminal})

    @property
    def order_of_tails(self) -> Tails:
        """When the rollout comes to what follows the last stochastic step."""
        return "in_company" if self.tail_cache != "none" else "last" if self.tail_weights != "same" else "mixed"

    @property
    def eval_guidance(self) -> float:
        """Guidance scale outside training."""
        return self.guidance_scale if self.eval_guidance_scale is None else self.eval_guidance_scale

    @field_validator("look_steps")
    @classmethod
    def _a_look_has_steps(cls, value: int | str) -> int | str:
        if value != "all" and int(value) < 1:
            raise ValueError("must be at least 1, or all")
        return value

    @field_validator("sde_steps", "granularities", "split_steps")
    @classmethod
    def _distinct(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("must not be empty; leave it out for the method's default")
        if len(set(value)) != len(value):
            raise ValueError(f"names a value twice; give each once: {','.join(map(str, sorted(set(value))))}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _paper_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        method = canonical(str(values.get("method", "g2rpo")))
        if method not in PAPER:
            raise ValueError(f"method={method!r} does not exist; {_nearest(method, PAPER)}")
        usual = PAPER[method]
        if values.get("noise", "calibrated_sde") != "calibrated_sde" or values.get("psi") is not None:
            usual = {**usual, "calibration_rounds": 0}  # nothing to calibrate
        return {**usual, **values, "method": method}

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        for name, methods in ONLY_FOR.items():
            usual = PAPER[self.method].get(name, type(self).model_fields[name].default)
            if self.method not in methods and getattr(self, name) != usual:
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing to method={self.method}; leave it out, or use method={methods[0]}"
                )
        # DenseGRPO's last step is stochastic too, unless CPS leaves it no noise; elsewhere the step into sigma = 0 is an ODE step.
        last = self.num_steps - (1 if self.method == "densegrpo" and self.noise != "cps" else 2)
        for k in self.sde_steps or ():
            if not 0 <= k <= last:
                raise ValueError(
                    f"sde_steps={','.join(map(str, self.sde_steps or ()))}: step {k} is outside the grid of num_steps="
                    f"{self.num_steps}; the step into sigma = 0 is not stochastic here, so 0 to {last} are possible"
                )
        for stride in self.granularities:
            if not 1 <= stride < self.num_steps:
                raise ValueError(
                    f"granularities={','.join(map(str, self.granularities))}: {stride} is not a stride of a grid of "
                    f"num_steps={self.num_steps}; 1 to {self.num_steps - 1} are possible, 1 being the full grid"
                )
        self._possible_window()
        if self.method == "branchgrpo":
            noisy = self.sde_steps or range(self.num_steps - 1)
            if not set(self.split_steps) <= set(noisy):
                raise ValueError(
                    f"split_steps={','.join(map(str, self.split_steps))}: a split needs a stochastic step; "
                    f"possible are {','.join(map(str, noisy))}"
                )
            leaves = self.split_fan ** len(self.split_steps)
            if self.group_size != leaves:
                raise ValueError(
                    f"group_size={self.group_size}: split_fan and split_steps make {leaves} leaves; give that or change them"
                )
        if self.best_of % 2 or self.best_of > self.group_size:
            raise ValueError(f"best_of={self.best_of}: give an even number up to group_size={self.group_size}, or 0 for all")
        if self.psi is not None and (self.noise != "calibrated_sde" or len(self.psi) != self.num_steps):
            raise ValueError(
                f"psi has {len(self.psi)} values and noise={self.noise}; it takes num_steps={self.num_steps} values and "
                "noise=calibrated_sde"
            )
        if self.noise == "calibrated_sde" and self.psi is None and not self.calibration_rounds:
            raise ValueError("noise=calibrated_sde: give psi, or calibration_rounds of at least 1 to find it")
        if self.calibration_rounds and (self.noise != "calibrated_sde" or self.psi is not None):
            raise ValueError(
                f"calibration_rounds={self.calibration_rounds}: there is nothing to calibrate; use noise=calibrated_sde without psi"
            )
        if self.method == "diffusionnft" and self.updates_per_rollout == "per_step":
            raise ValueError(
                "updates_per_rollout=per_step means nothing to method=diffusionnft, which trains no step; give a number"
            )
        self._possible_tails()
        if self.compile and self.model == "zimage":
            raise ValueError(
                f"compile={self.compile}: prompts of model=zimage keep their own lengths, and each would be compiled; leave it out"
            )
        if self.compile and self.tail_cache != "none":
            raise ValueError(
                f"compile={self.compile}: tail_cache={self.tail_cache} changes the blocks while they run; leave one of them out"
            )
        if self.noise == "cps" and self.eta > 1:
            raise ValueError(f"eta={self.eta}: noise=cps turns by eta * 90 degrees; give at most 1")
        return self

    def _possible_tails(self) -> None:
        if self.method not in ("flow_grpo", "grpo_guard", "dancegrpo", "branchgrpo"):
            return
        left = self.num_steps - 1 - max(self.sde_steps or (self.num_steps - 2,))
        whole = 2 if self.tail_cache.startswith("taylorseer") else 1
        for name, usual, most in (("tail_order", 1, 1), ("tail_ratio", 1.0, 1), ("tail_cache", "none", whole)):
            if getattr(self, name) != usual and left <= most:
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing where only {left} of the steps comes after the last stochastic "
                    f"one; leave it out, or end sde_steps before {self.num_steps - 1 - most}"
                )

    def _possible_window(self) -> None:
        room = self.num_steps // 2 if self.window_region == "first_half" else self.num_steps - 1
        if self.method in _WINDOWED and not 1 <= self.window_size <= room:
            raise ValueError(
                f"window_size={self.window_size}: a window of {room} steps at most fits into num_steps={self.num_steps} "
                f"(window_region={self.window_region}), and it must not be empty; give 1 to {room}"
            )


def settings(values: Mapping[str, Any]) -> Settings:
    """Settings from keys and values, as written in a file or on the command line.

    Raises SettingsError whose message names each wrong setting, its value and the nearest right one.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(e) for e in error.errors())) from None


def _nearest(name: str, known: Mapping[str, Any] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is not a setting; {_nearest(name, Settings.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    field = Settings.model_fields.get(str(error["loc"][0]))
    hint = f" ({field.description})" if field is not None and field.description else ""
    return f"{error['loc'][0]}={error['input']!r}: {message[0].lower() + message[1:]}{hint}"


def existing_file(setting: str, value: str) -> Path:
    """`value` as a path. Raises SettingsError naming `setting` and, where there is one, the file nearest in name."""
    path = Path(value).expanduser()
    if path.is_file():
        return path
    nearby = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], n=1)
    hint = f"did you mean {path.parent / nearby[0]}?" if nearby else "give the path of a text file"
    raise SettingsError(f"{setting}={value}: there is no such file; {hint}")

"""The settings of a run: one typed, strict object. An unknown key is an error that names the nearest valid one."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from flowgrain.credit import Mix, Scope
from flowgrain.objective import KLForm
from flowgrain.tree import CoarseGrid

PAPER: dict[str, dict[str, Any]] = {
    "g2rpo": {
        "num_steps": 16,
        "group_size": 12,
        "granularities": (1, 2, 3),
        "eta": 0.7,
        "std_scope": "group",
        "std_unbiased": True,
        "std_epsilon": 1e-8,
        "reward_mix": "advantage",
        "updates_per_rollout": 1,
        "kl_weight": 0.0,
    },
    "flow_grpo": {
        "num_steps": 10,
        "group_size": 24,
        "eta": 0.7,
        "std_scope": "global",
        "std_unbiased": False,
        "std_epsilon": 1e-4,
        "reward_mix": "reward",
        "updates_per_rollout": 2,
        "kl_weight": 0.04,
    },
}
"""What each method's paper sets, where methods differ (spec of each in docs/). Whatever a recipe or user says goes before it."""


class SettingsError(ValueError):
    """A setting that cannot be: the message names the setting, its value and what would be right."""


def _listed(value: Any) -> Any:
    """1,2,3 and a lone 1 as lists, as they are written on the command line."""
    if isinstance(value, str):
        return [part for part in re.split(r"[,\s]+", value.strip("[]() ")) if part]
    return [value] if isinstance(value, int | float) else value


IntList = Annotated[tuple[int, ...], BeforeValidator(_listed)]


def _weights(value: Any) -> Any:
    """oracle, oracle:1,clip:0.5 and ["oracle", "clip"] as {name: weight}. One's own reward is package.module:function."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if isinstance(value, list | tuple):
        weights = {}
        for part in value:
            name, _, weight = str(part).rpartition(":")
            numeric = bool(name) and re.fullmatch(r"[-+.\deE]+", weight) is not None
            weights[name if numeric else str(part)] = float(weight) if numeric else 1.0
        return weights
    return value


class Settings(BaseModel):
    """Everything that determines a run. Fields that a method's paper sets (see PAPER) default to the paper's value.

    Example: Settings(method="g2rpo", granularities=(1, 2, 3), learning_rate=3e-4, max_steps=60)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: str = Field("run", min_length=1, pattern=r"^[\w.+-]+$", description="the run's folder is runs/<name>")
    method: str = Field("g2rpo", description="g2rpo or flow_grpo")
    model: str = Field("shapes", description="the backbone; shapes is bundled")
    seed: int = Field(0, ge=0, description="all randomness of the run follows from it")

    # the grid and the tree
    num_steps: int = Field(16, ge=2, le=1000, description="T, sampling steps while training")
    shift: float = Field(3.0, gt=0, description="timestep shift of the noise grid")
    group_size: int = Field(12, ge=2, description="G, samples that are compared with each other")
    sde_steps: IntList | None = Field(None, description="M, grid indices with noise and training; default: see the method")
    granularities: IntList = Field((1,), description="Lambda, strides at which every branch is finished")
    coarse_grid: CoarseGrid = Field("stride", description="stride (the published code's grid) or exact")
    anchor_image: bool = Field(True, description="also decode and score the anchor's own image")
    eta: float = Field(0.7, gt=0, description="noise strength of the stochastic steps")

    # rewards and credit
    rewards: Annotated[dict[str, float], BeforeValidator(_weights)] = Field(
        {"oracle": 1.0}, min_length=1, description="name:weight; names of bundled rewards or package.module:function"
    )
    reward_mix: Mix = Field("advantage", description="several rewards: sum of advantages, or of rewards")
    std_scope: Scope = Field("group", description="whose std divides: of the group, or global (of the batch)")
    std_unbiased: bool = True
    std_epsilon: float = Field(1e-8, gt=0)
    advantage_clip: float = Field(5.0, gt=0)
    reward_batch: int = Field(256, ge=1, description="images of one reward call")
    max_failed_rewards: float = Field(0.2, ge=0, le=1, description="share of failed rewards in a step at which the run stops")

    # the update
    max_steps: int = Field(100, ge=1, description="rollouts; each is followed by its updates")
    prompts_per_step: int = Field(24, ge=1)
    updates_per_rollout: int | Literal["per_step"] = Field(1, description="optimizer steps a rollout, or one for each SDE step")
    clip_range: float = Field(1e-4, gt=0)
    kl_weight: float = Field(0.0, ge=0, description="beta, weight of the KL to the reference")
    kl_form: KLForm = Field("gaussian", description="the exact KL, or flow_grpo's published variant")
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads; 0 leaves torch's choice")
    rows_per_pass: int = Field(128, ge=1, description="rows of one model call while sampling")
    train_rows_per_pass: int | None = Field(None, ge=1, description="rows of one gradient forward; default: rows_per_pass")

    # prompts and evaluation
    prompts: str | None = Field(None, description="file with a prompt a line; default: the model's own training prompts")
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

    @field_validator("sde_steps", "granularities")
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
        method = values.get("method", "g2rpo")
        if method not in PAPER:
            raise ValueError(f"method={method!r} does not exist; {_nearest(str(method), PAPER)}")
        return {**PAPER[method], **values}

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        last = self.num_steps - 2
        for k in self.sde_steps or ():
            if not 0 <= k <= last:
                raise ValueError(
                    f"sde_steps={','.join(map(str, self.sde_steps or ()))}: step {k} is outside the grid of num_steps="
                    f"{self.num_steps}; the step into sigma = 0 is never stochastic, so 0 to {last} are possible"
                )
        for stride in self.granularities:
            if not 1 <= stride < self.num_steps:
                raise ValueError(
                    f"granularities={','.join(map(str, self.granularities))}: {stride} is not a stride of a grid of "
                    f"num_steps={self.num_steps}; 1 to {self.num_steps - 1} are possible, 1 being the full grid"
                )
        if self.method == "flow_grpo" and self.granularities != (1,):
            raise ValueError(f"granularities={self.granularities} has no meaning for method=flow_grpo; use method=g2rpo")
        return self


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

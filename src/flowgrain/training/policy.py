"""The policy: a backbone's transformer with what training adds to it: LoRA or full, guidance, reference, EMA, dtype."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from flowgrain.models import Backbone, Conditioning, Dtypes, GuidesItself, take
from flowgrain.distributed.mesh import ALONE, Group, copy_into, full_state, shard, whole
from flowgrain.config.schema import Settings, SettingsError
from flowgrain.models.acceleration import Quantised, caching, check

_LORA_METADATA = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")  # what loaders need beside the weights


def compute_device(setting: str) -> torch.device:
    """The device of setting `device`. Raises SettingsError for one that this machine lacks."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """bf16 on a GPU and fp32 on a CPU unless the setting says otherwise: bf16 on a CPU without its instructions is slower."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def load_dtypes(s: Settings, train: bool = True) -> Dtypes:
    """The dtypes in which a model's parts are loaded. Raises SettingsError for a device that this machine lacks.

    Under LoRA the frozen transformer is read in the computing dtype and never exists in fp32; a full fine-tune reads fp32 master
    weights. auto is fp32 for the VAE, whose rounding the images would show, and the computing dtype for the text encoders.
    """
    device = compute_device(s.device)
    transformer = compute_dtype(s.dtype, device) if s.lora_rank or not train else torch.float32
    vae = torch.bfloat16 if s.vae_dtype == "bfloat16" else torch.float32
    return Dtypes(transformer, vae, compute_dtype(s.encoder_dtype, device))


class Policy:
    """The trained model. Master weights stay fp32; in bf16 sampling runs on a copy and training under autocast.

    A backbone belongs to one policy, which trains it in place. keep_old adds a slow copy of the policy, `old`, that a
    method with a forward process samples from (DiffusionNFT). Without train it only samples: one copy, in the computing dtype.
    In a group of several processes a full fine-tune is sharded, and what samples is sharded too or a whole copy, `replica`.
    """

    def __init__(
        self,
        backbone: Backbone,
        s: Settings,
        device: torch.device,
        keep_old: bool = False,
        train: bool = True,
        group: Group = ALONE,
    ) -> None:
        self.backbone, self.device, self.group = backbone, device, group
        self.dtype = compute_dtype(s.dtype, device)
        self.lora = train and s.lora_rank > 0
        # Trained weights are fp32; under LoRA the frozen rest may be as coarse as the computation. No dropout, or the ratio
        # would not be 1.
        model = backbone.transformer.to(torch.float32 if train and not self.lora else self.dtype).eval().requires_grad_(False)
        self.transformer = model
        self._class_name = type(model).__name__  # sharding makes another class of it
        if self.lora:
            self._add_adapter(s)
        elif train:
            model.requires_grad_(True)
        several, coarse = group.size > 1 and train, self.dtype != torch.float32
        self.replica = several and _holds_replica(s, model, self.dtype, device, group)
        sharded = several and not (self.lora and self.replica)
        self._tails_sharded = sharded if keep_old else several and not self.replica
        if train:
            check(s, model, device, self._tails_sharded)
        # Copies are made while the model is whole, and on the CPU where it will be sharded: FSDP moves it block by block.
        names = [name for name, module in model.named_modules() if any(module is block for block in backbone.blocks)]
        needs_copy = train and s.kl_weight > 0 and not self.lora
        self.frozen = copy.deepcopy(model).requires_grad_(False) if needs_copy else None
        own_sampler = train and not self.lora and (coarse or self.replica)
        self.sampler = copy.deepcopy(model).requires_grad_(False).to(self.dtype) if own_sampler else model
        # Of a LoRA's slow copy only the adapter is a copy, but where shards are taken from each.
        shared = {} if sharded else {id(p): p for p in model.parameters() if not p.requires_grad}
        self.old = copy.deepcopy(model, shared).requires_grad_(False) if keep_old else None
        self._block_names, self.tail_cache, self.quantised = names, "none", None
        if train:
            self._set_tails(s)
        if sharded:
            for one in (model, self.frozen, self.old, None if self.replica or self.sampler is model else self.sampler):
                if one is not None:
                    shard(one, [one.get_submodule(name) for name in names], group)
        backbone.to(device)
        for one in (self.frozen, self.sampler, self.old):
            if one is not None:
                one.to(device)
        if self.quantised is not None:
            self.quantised.to(device)
        self.static_rows: list[int] = []
        if s.compile:
            self.static_rows = sorted({s.rows_per_pass, s.train_rows_per_pass or s.rows_per_pass})
            self._compile_blocks(s.compile, model, self.frozen, self.sampler, self.old, self._quantised_model)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = None
        if train and s.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(list(self.trained.values()), decay=s.ema_decay)
        self.ema_every = s.ema_every
        self.updates = 0
        self.unconditional: Conditioning = {}

    @property
    def _quantised_model(self) -> nn.Module | None:
        return self.quantised.model if self.quantised is not None else None

    def _compile_blocks(self, backend: str, *models: nn.Module | None) -> None:
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks x sizes x with and without gradient
        for one in {id(model): model for model in models if model is not None}.values():
            for name in self._block_names:
                one.get_submodule(name).compile(backend=backend, dynamic=False)

    def _set_tails(self, s: Settings) -> None:
        self.tail_cache, self.quantised = s.tail_cache, None
        if s.tail_weights != "same":
            self.quantised = Quantised(self.old or self.sampler, self._block_names, s.tail_weights, self.dtype)

    def with_tails(self, s: Settings) -> "Policy":
        """This policy, the same weights, with the tails that `s` asks for. Raises SettingsError for some that cannot be had."""
        check(s, self.transformer, self.device, self._tails_sharded)
        other = copy.copy(self)
        other._set_tails(s)
        if other.quantised is not None:
            other.quantised.to(self.device)
        if s.compile:
            other._compile_blocks(s.compile, other._quantised_model)
        return other

    def _add_adapter(self, s: Settings) -> None:
        # peft and EMAModel take seconds to import, which a plan or a refused setting should not cost.
        from peft import LoraConfig

        adapter = LoraConfig(
            r=s.lora_rank,
            lora_alpha=s.lora_alpha or 2 * s.lora_rank,
            init_lora_weights="gaussian",
            target_modules=self.backbone.lora_targets,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            self.transformer.add_adapter(adapter)
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of `prompts` on the policy's device."""
        if not self.unconditional:
            self.unconditional = {name: value.to(self.device) for name, value in self.backbone.encode([""]).items()}
        return {name: value.to(self.device) for name, value in self.backbone.encode(prompts).items()}

    def velocity(self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] of `model`. Guidance is embedded where the backbone takes it so; else it is true CFG, unless it is 1.

        True CFG is v_free + guidance (v - v_free), unless the backbone has a formula of its own. Of compiled blocks a batch is
        filled up to a size that they know.
        """
        rows = next((rows for rows in self.static_rows if rows >= len(x)), len(x))
        if rows > len(x):
            repeated = torch.arange(rows, device=x.device).clamp(max=len(x) - 1)
            full = self.velocity(model, x[repeated], sigma[repeated], take(cond, repeated), guidance)
            return full[: len(x)]
        if self.backbone.embedded_guidance:
            scale = torch.full((len(x),), guidance, device=x.device)
            return self.backbone.velocity(model, x, sigma, {**cond, "guidance": scale})
        if guidance == 1:
            return self.backbone.velocity(model, x, sigma, cond)
        both = {name: torch.cat([value, self.unconditional[name].expand_as(value)]) for name, value in cond.items()}
        v, v_free = self.backbone.velocity(model, torch.cat([x, x]), torch.cat([sigma, sigma]), both).float().chunk(2)
        if isinstance(self.backbone, GuidesItself):
            return self.backbone.guide(v, v_free, guidance)
        return v_free + guidance * (v - v_free)

    @torch.no_grad()
    def sample_velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float, model: nn.Module | None = None
    ) -> Tensor:
        """v [B, *L] without gradient, in the sampling dtype; of another copy than the sampling one, if it is given."""
        model = model or self.sampler
        mixed = model is self.old or (self.lora and model is self.sampler)  # the other copies are of the computing dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed and self.dtype != torch.float32):
            return self.velocity(model, x.to(self.dtype), sigma, cond, guidance)

    @contextlib.contextmanager
    def tail(self) -> Iterator[Callable[..., Tensor]]:
        """Inside, tail(x, sigma, cond, guidance, follows) gives cheaper velocities [B, *L]; nothing else may use the model there.

        follows: the rows are those of the call before, a step on.
        """
        source = self.old or self.sampler
        if self.quantised is not None and self.quantised.stale:
            self.quantised.take(dict(zip(self.trained, self._trained_of(source), strict=True)))
        model = self._quantised_model or source
        with caching(model, self.tail_cache) as around:

            def velocity(x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float, follows: bool) -> Tensor:
                with around(follows):
                    return self.sample_velocity(x, sigma, cond, guidance, model)

            yield velocity

    def train_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] with gradient where grad is enabled, in fp32 or under autocast."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.velocity(self.transformer, x, sigma, cond, guidance).float()

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] of the model as it was before training: the adapter off, or a frozen copy."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if self.lora:
                self.transformer.disable_adapters()
                try:
                    return self.velocity(self.transformer, x, sigma, cond, guidance).float()
                finally:
                    self.transformer.enable_adapters()
            if self.frozen is None:
                raise RuntimeError("a full fine-tune keeps a reference only if kl_weight > 0")
            return self.velocity(self.frozen, x, sigma, cond, guidance).float()

    @torch.no_grad()
    def old_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] of the slow copy. Raises RuntimeError if none is kept."""
        if self.old is None:
            raise RuntimeError("this policy keeps no old copy")
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.velocity(self.old, x, sigma, cond, guidance).float()

    def _trained_of(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of a copy that are trained in the original, in its order."""
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.trained]

    @torch.no_grad()
    def drag_old(self, decay: float) -> None:
        """Moves the slow copy: it keeps `decay` of itself and takes the rest from the trained weights."""
        if self.old is not None:
            for slow, parameter in zip(self._trained_of(self.old), self.trained.values(), strict=True):
                slow.lerp_(parameter, 1 - decay)
            self._outdate()

    def updated(self) -> None:
        """To be called after every optimizer step: moves the EMA and refreshes the sampling copy."""
        self.updates += 1
        if self.ema is not None and self.updates % self.ema_every == 0:
            self.ema.step(self.trained.values())
        self.refresh()
        self._outdate()

    def _outdate(self) -> None:
        if self.quantised is not None:
            self.quantised.stale = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights into the sampling copy, where there is one."""
        if self.sampler is not self.transformer:
            copy_into(self._trained_of(self.sampler), self.trained.values())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are the EMA's, if there is one; afterwards the trained ones are back, to the bit."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained.values())
        self.ema.copy_to(self.trained.values())
        self.refresh()
        try:
            yield
        finally:
            self.ema.restore(self.trained.values())
            self.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights, EMA and old copy by name, themselves and no copies: a checkpoint's to write, or to read into."""
        found: dict[str, Tensor] = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        if self.ema is not None:
            found |= {f"ema.{name}": p for name, p in zip(self.trained, self.ema.shadow_params, strict=True)}
        if self.old is not None:
            found |= {f"old.{name}": p.detach() for name, p in zip(self.trained, self._trained_of(self.old), strict=True)}
        return found

    def plain(self) -> dict[str, int]:
        """What else of the policy a checkpoint keeps."""
        return {"updates": self.updates, "ema_steps": self.ema.optimization_step if self.ema is not None else 0}

    def restored(self, plain: Mapping[str, int]) -> None:
        """To be called when `tensors` have been read: takes the rest, as `plain` gave it."""
        self.updates = plain["updates"]
        if self.ema is not None:
            self.ema.optimization_step = plain["ema_steps"]
        self.refresh()
        self._outdate()

    def export(self, folder: Path) -> None:
        """Writes `folder`/transformer for diffusers' from_pretrained, or `folder`/lora for load_lora_weights; EMA weights."""
        aside = folder.with_name(f".{folder.name}.new")
        if self.group.first:
            shutil.rmtree(aside, ignore_errors=True)
        with self.averaged():
            if self.lora:
                self._export_lora(aside / "lora")
            elif self.group.size == 1:
                self.transformer.save_pretrained(aside / "transformer")
            else:
                self._export_sharded(aside / "transformer")
        if self.group.first:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)

    def _export_lora(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        layers = {name: whole(value) for name, value in get_peft_model_state_dict(self.transformer).items()}
        if self.group.first:
            config = self.transformer.peft_config["default"].to_dict()
            self.backbone.lora_format.save_lora_weights(
                folder,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata={k: v for k, v in config.items() if k in _LORA_METADATA},
            )

    def _export_sharded(self, folder: Path) -> None:
        """What save_pretrained writes, without a whole model in any process's device memory."""
        state = full_state(self.transformer)
        if self.group.first:
            folder.mkdir(parents=True)
            config = {**json.loads(self.transformer.to_json_string()), "_class_name": self._class_name}
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


def _holds_replica(s: Settings, model: nn.Module, dtype: torch.dtype, device: torch.device, group: Group) -> bool:
    """Whether every process keeps a whole copy to sample with: as set, or if it takes under 40% of the free memory everywhere."""
    if s.rollout_weights != "auto":
        return s.rollout_weights == "replica"
    size = sum(p.numel() for p in model.parameters()) * torch.empty(0, dtype=dtype).element_size()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return all(group.collect(size < 0.4 * free))


def load_export(backbone: Backbone, path: Path, kind: Literal["lora", "transformer"]) -> None:
    """Puts weights that were exported, here or elsewhere, into `backbone`: a LoRA's folder or file, or a transformer's folder.

    Raises SettingsError if they are not of this model.
    """
    try:
        if kind == "lora":
            layers = [name for name in backbone.lora_format.lora_state_dict(path) if "lora_A" in name or "lora_B" in name]
            foreign = [name for name in layers if name.startswith("text_encoder")]
            if foreign:
                raise ValueError(f"it also adapts text encoders ({foreign[0]}), which are not trained here")
            backbone.load_lora(path)
            taken = sum("lora_A" in name or "lora_B" in name for name, _ in backbone.transformer.named_parameters())
            if not layers or taken != len(layers):
                raise ValueError(f"the model takes {taken} of its {len(layers)} tensors: it is another model's")
        else:
            found = type(backbone.transformer).from_pretrained(path, torch_dtype=backbone.transformer.dtype)
            backbone.transformer.load_state_dict(found.state_dict())
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise SettingsError(f"{path}: cannot be loaded into this model ({error})") from error

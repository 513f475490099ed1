"""The policy: a backbone's transformer with what training adds to it: LoRA or full, guidance, reference, EMA, dtype."""

import contextlib
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowgrain.backbones import Backbone, Conditioning, Dtypes, GuidesItself
from flowgrain.settings import Settings, SettingsError

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


def load_dtypes(s: Settings) -> Dtypes:
    """The dtypes in which a model's parts are loaded. Raises SettingsError for a device that this machine lacks.

    Under LoRA the frozen transformer is read in the computing dtype and never exists in fp32; a full fine-tune reads fp32 master
    weights. auto is fp32 for the VAE, whose rounding the images would show, and the computing dtype for the text encoders.
    """
    device = compute_device(s.device)
    transformer = compute_dtype(s.dtype, device) if s.lora_rank else torch.float32
    vae = torch.bfloat16 if s.vae_dtype == "bfloat16" else torch.float32
    return Dtypes(transformer, vae, compute_dtype(s.encoder_dtype, device))


class Policy:
    """The trained model. Master weights stay fp32; in bf16 sampling runs on a copy and training under autocast.

    A backbone belongs to one policy, which trains it in place. keep_old adds a slow copy of the policy, `old`, that a
    method with a forward process samples from (DiffusionNFT). Without train it only samples: one copy, in the computing dtype.
    """

    def __init__(self, backbone: Backbone, s: Settings, device: torch.device, keep_old: bool = False, train: bool = True) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = compute_dtype(s.dtype, device)
        self.lora = train and s.lora_rank > 0
        backbone.to(device)
        # Trained weights are fp32; under LoRA the frozen rest may be as coarse as the computation. No dropout, or the ratio
        # would not be 1.
        self.transformer = backbone.transformer.to(torch.float32 if train and not self.lora else self.dtype).eval()
        # peft and EMAModel take seconds to import, which a plan or a refused setting should not cost.
        if self.lora:
            from peft import LoraConfig

            self.transformer.requires_grad_(False)
            adapter = LoraConfig(
                r=s.lora_rank,
                lora_alpha=s.lora_alpha or 2 * s.lora_rank,
                init_lora_weights="gaussian",
                target_modules=backbone.lora_targets,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(s.seed)
                self.transformer.add_adapter(adapter)
            for parameter in self.transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        else:
            self.transformer.requires_grad_(train)
        self.trained = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self.ema = None
        if train and s.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(list(self.trained.values()), decay=s.ema_decay)
        self.ema_every = s.ema_every
        self.updates = 0
        needs_copy = train and s.kl_weight > 0 and not self.lora
        self.frozen = copy.deepcopy(self.transformer).requires_grad_(False) if needs_copy else None
        self.sampler = self.transformer
        if train and self.dtype != torch.float32 and not self.lora:
            self.sampler = copy.deepcopy(self.transformer).requires_grad_(False).to(self.dtype)
        self.old = copy.deepcopy(self.transformer).requires_grad_(False) if keep_old else None
        self.unconditional: Conditioning = {}

    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of `prompts` on the policy's device."""
        if not self.unconditional:
            self.unconditional = {name: value.to(self.device) for name, value in self.backbone.encode([""]).items()}
        return {name: value.to(self.device) for name, value in self.backbone.encode(prompts).items()}

    def velocity(self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] of `model`. Guidance is embedded where the backbone takes it so; else it is true CFG, unless it is 1.

        True CFG is v_free + guidance (v - v_free), unless the backbone has a formula of its own.
        """
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
    def sample_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """v [B, *L] without gradient, in the sampling dtype."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.lora and self.dtype != torch.float32):
            return self.velocity(self.sampler, x.to(self.dtype), sigma, cond, guidance)

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
            torch._foreach_lerp_(self._trained_of(self.old), list(self.trained.values()), 1 - decay)

    def updated(self) -> None:
        """To be called after every optimizer step: moves the EMA and refreshes the sampling copy."""
        self.updates += 1
        if self.ema is not None and self.updates % self.ema_every == 0:
            self.ema.step(self.trained.values())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights into the sampling copy, where there is one."""
        if self.sampler is not self.transformer:
            torch._foreach_copy_(self._trained_of(self.sampler), list(self.trained.values()))

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

    def state(self) -> dict[str, Any]:
        """Trained weights and EMA, for a checkpoint."""
        ema = self.ema.state_dict() if self.ema is not None else None
        old = None if self.old is None else [p.detach() for p in self._trained_of(self.old)]
        return {"weights": {n: p.detach() for n, p in self.trained.items()}, "ema": ema, "old": old, "updates": self.updates}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` gave, for a policy of the same settings."""
        for name, parameter in self.trained.items():
            parameter.copy_(state["weights"][name])
        if self.ema is not None:
            decay = self.ema.decay
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
            self.ema.decay = decay  # the settings', which may have been changed for the resume
        if self.old is not None:
            torch._foreach_copy_(self._trained_of(self.old), state["old"])
        self.updates = state["updates"]
        self.refresh()

    def export(self, folder: Path) -> None:
        """Writes `folder`/transformer for diffusers' from_pretrained, or `folder`/lora for load_lora_weights; EMA weights."""
        aside = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        with self.averaged():
            if self.lora:
                from peft import get_peft_model_state_dict

                config = self.transformer.peft_config["default"].to_dict()
                self.backbone.lora_format.save_lora_weights(
                    aside / "lora",
                    transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                    transformer_lora_adapter_metadata={k: v for k, v in config.items() if k in _LORA_METADATA},
                )
            else:
                self.transformer.save_pretrained(aside / "transformer")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def load_export(backbone: Backbone, path: Path, kind: Literal["lora", "transformer"]) -> None:
    """Puts weights that were exported, here or elsewhere, into `backbone`: a LoRA's folder or file, or a transformer's folder.

    Raises SettingsError if they are not of this model.
    """
    try:
        if kind == "lora":
            backbone.load_lora(path)
        else:
            found = type(backbone.transformer).from_pretrained(path, torch_dtype=backbone.transformer.dtype)
            backbone.transformer.load_state_dict(found.state_dict())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingsError(f"{path}: cannot be loaded into this model ({error})") from error

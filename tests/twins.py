"""Tiny twins of the real models: the same classes from small configs with random weights, saved as a diffusers pipeline."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def clip_tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase)
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip(projection: bool, hidden: int = 16):
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=hidden,
        bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=channels, norm_num_groups=4, sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5, shift_factor=0.06,
    ).eval()  # fmt: skip


def sd3(folder, with_t5: bool = True) -> None:
    """SD3.5's make: three text encoders, the third of them optional."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4),
        text_encoder=clip(True), tokenizer=clip_tokenizer(), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip
    pipe.save_pretrained(folder)


def flux(folder, guidance: bool = True) -> None:
    """FLUX.1-dev's make, or -schnell's without guidance."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance)
    pipe = FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(4), text_encoder=clip(False), tokenizer=clip_tokenizer(),
        text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    pipe.save_pretrained(folder)

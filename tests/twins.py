"""Tiny twins of the published models: small configs with random weights, saved as pipelines."""

import string

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    letters = list(string.ascii_lowercase)
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=length
    )


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip(projection: bool, hidden: int = 16):
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=hidden,
        bos_token_id=52,
        eos_token_id=53,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.06,
    ).eval()


def sd3(folder, with_t5: bool = True, clip_tokens: int = 77) -> None:
    """SD3.5: three text encoders, of which T5 is optional."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(clip_tokens),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(clip_tokens),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipe.save_pretrained(folder)


def flux(folder, guidance: bool = True) -> None:
    """FLUX.1-dev, or FLUX.1-schnell without guidance embedding."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae(4),
        text_encoder=clip(False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.save_pretrained(folder)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
SYSTEM_PROMPT = (
    "the image by detailing color shape size texture quantity text spatial relationships "
    "of objects and background"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per letter, except for the words of the templates.

    The pipeline of Qwen-Image expects that its system prompt has 34 tokens.
    """
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], chat_template=CHAT
    )
    words = [
        "system",
        "user",
        "assistant",
        "Describe",
        *(f" {word}" for word in SYSTEM_PROMPT.split()),
    ]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", *words])
    return tokenizer


def qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def flux2(folder) -> None:
    """FLUX.2-klein. Its pipeline reads layers 9, 18 and 27 of the text encoder."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    decoder.bn.running_mean.uniform_(-1, 1)
    decoder.bn.running_var.uniform_(0.5, 2)
    pipe = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=Qwen3ForCausalLM(qwen3(27)).eval(),
        tokenizer=qwen_tokenizer(),
    )
    pipe.save_pretrained(folder)


def qwen_image(folder) -> None:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.9, 1.5],
        latents_std=[2.8, 1.4, 2.3, 0.9],
    ).eval()
    text = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    QwenImagePipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=decoder,
        text_encoder=encoder,
        tokenizer=qwen_tokenizer(),
    ).save_pretrained(folder)


def zimage(folder) -> None:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    torch.nn.init.normal_(transformer.cap_pad_token)
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=Qwen3Model(qwen3(3)).eval(),
        tokenizer=qwen_tokenizer(),
    ).save_pretrained(folder)


def save_all(root) -> None:
    """Save every twin in a directory of its name, and the variants sd3-no-t5 and schnell."""
    sd3(root / "sd3")
    sd3(root / "sd3-no-t5", with_t5=False)
    flux(root / "flux")
    flux(root / "schnell", guidance=False)
    flux2(root / "flux2")
    qwen_image(root / "qwen_image")
    zimage(root / "zimage")


def bert_tokenizer() -> BertTokenizer:
    letters = list(string.ascii_lowercase)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return BertTokenizer(vocab={w: i for i, w in enumerate(words)})


def siglip_tokenizer(folder):
    """SigLIP's tokenizer with a small vocabulary, also saved in `folder`. Needs sentencepiece."""
    import io

    import sentencepiece
    from transformers import SiglipTokenizer

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "two dogs", "bird on a tree"] * 10),
        model_writer=file,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        model_type="unigram",
        minloglevel=2,
        num_threads=1,
    )
    (folder / "spiece.model").write_bytes(file.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer.save_pretrained(folder)
    return tokenizer


PROMPTS = ["a red cat", "two blue dogs", "a green bird", "seven trees"]
PIPELINES = {
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "flux2": Flux2KleinPipeline,
    "qwen_image": QwenImagePipeline,
    "zimage": ZImagePipeline,
}
SIZE = {"height": 32, "width": 48, "max_prompt_tokens": 40}
PARITY_CASES = [
    ("sd3", "sd3", 4.5),
    ("sd3", "sd3", 1.0),
    ("sd3", "sd3-no-t5", 3.0),
    ("flux", "flux", 3.5),
    ("flux", "schnell", 1.0),
    ("flux2", "flux2", 4.0),
    ("flux2", "flux2", 1.0),
    ("qwen_image", "qwen_image", 4.0),
    ("qwen_image", "qwen_image", 1.0),
    ("zimage", "zimage", 5.0),
    ("zimage", "zimage", 1.0),
]
"""Backbone, directory of `save_all`, and guidance scale."""


def pipeline_images(pipe, noise, num_steps, guidance, prompts, own_grid=False):
    """The pipeline's own images of `noise`. It applies its timestep shift itself.

    `own_grid`: the call gives no noise levels, so that the pipeline uses its own. Otherwise it
    gives linspace(1, 1 / T, T).
    """
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": guidance}
    if isinstance(pipe, QwenImagePipeline):
        arguments = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    if isinstance(pipe, ZImagePipeline):
        arguments = {"guidance_scale": guidance - 1}  # v + scale (v - v_free)
    if not own_grid:
        arguments["sigmas"] = np.linspace(1, 1 / num_steps, num_steps).tolist()
    return pipe(
        prompt=list(prompts),
        height=SIZE["height"],
        width=SIZE["width"],
        max_sequence_length=SIZE["max_prompt_tokens"],
        latents=noise,
        num_inference_steps=num_steps,
        output_type="pt",
        **arguments,
    ).images

"""Numbers of tokens of prompts, their limits, and padding."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgrain.models.base import Conditioning, ModelConfig

log = logging.getLogger(__name__)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text."""
    return list(map(len, tokenizer(list(texts))["input_ids"]))


def chat_token_counts(tokenizer: Any, texts: Sequence[str], thinking: bool) -> list[int]:
    """Return the number of tokens of each text as a user message in the chat template.

    Args:
        tokenizer: tokenizer of transformers with a chat template.
        texts: the messages.
        thinking: argument `enable_thinking` of the chat template.
    """
    chats = [[{"role": "user", "content": text}] for text in texts]
    tokens = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, enable_thinking=thinking
    )
    return list(map(len, tokens["input_ids"]))


def check_lengths(counts: Sequence[int], model: ModelConfig, encoder_limit: int | None) -> None:
    """Check numbers of tokens against model.max_prompt_tokens and the limit of the encoders.

    Args:
        counts: number of tokens of each prompt.
        model: settings of the model.
        encoder_limit: maximum number of tokens that the text encoders read; None if there is none.

    Raises:
        ValueError: a prompt is too long and model.long_prompts is "error".
    """
    own_limit = encoder_limit is None or model.max_prompt_tokens < encoder_limit
    limit = model.max_prompt_tokens if own_limit or encoder_limit is None else encoder_limit
    too_long = [number for number, count in enumerate(counts, 1) if count > limit]
    if not too_long:
        return
    if model.long_prompts == "truncate":
        log.warning(
            "%d of %d prompts are truncated to %d tokens.", len(too_long), len(counts), limit
        )
        return
    if own_limit:
        source, fix = "model.max_prompt_tokens", "raise model.max_prompt_tokens"
    else:
        source, fix = "the limit of CLIP", "use T5 (model.t5=true)"
    first, others = too_long[0], len(too_long) - 1
    also = f" {others:,} more prompts are too long." if others else ""
    raise ValueError(
        f"prompt {first} has {counts[first - 1]} tokens. The maximum is {limit} ({source}).{also} "
        f"Shorten the prompt, {fix}, or set model.long_prompts=truncate."
    )


def pad(embeds: Tensor, length: int) -> Conditioning:
    """Return the embeddings [n, D] of n tokens as "embeds" [1, length, D] and "length" [1], n."""
    padded = F.pad(embeds, (0, 0, 0, length - len(embeds)))
    return {"embeds": padded[None], "length": torch.tensor([len(embeds)])}

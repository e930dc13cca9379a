"""Inputs that the small tasks share: a Qwen2 policy with random weights, a tokenizer of characters, and JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,:\n\\{}<>|_"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL[1:3]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(
    path: Path,
    seed: int,
    layers: int = 4,
    hidden: int = 128,
    tied: bool = False,
    heads: tuple[int, int] = (4, 2),
    deviation: float = 0.02,
    rope_theta: float = 10000.0,
) -> None:
    """Save a Qwen2 model with random weights, and its tokenizer, as a Hugging Face folder.

    `heads`: attention heads and key-value groups. vLLM on CPUs takes no head size below 32. `deviation`: standard
    deviation of the weights; transformers' 0.02 suits hidden sizes of thousands, 1 / sqrt(hidden) a narrow model.
    `rope_theta`: base of the rotary embedding; a small one spends all frequencies on the distances of short texts.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=deviation,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

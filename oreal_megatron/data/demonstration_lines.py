"""Demonstrations for `oreal sft` and `oreal distill`: lines with question and response, or with chat messages.

Of a chat, every message of the assistant is a sample of its own: its prompt is what the chat template renders of the
messages before it, as at inference, and the loss is on its tokens only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import ConfigError
from oreal_megatron.data import chat_template, key_map
from oreal_megatron.data.chat_template import Message
from oreal_megatron.data.lines import Line, read_lines
from oreal_megatron.data.problems import NO_KEYS, require_field, require_text
from oreal_megatron.data.user_functions import Template
from oreal_megatron.records import Sample


class Turn(NamedTuple):
    """A response with the messages before it."""

    messages: list[Message]
    response: str


def load_demonstrations(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    max_tokens: int,
    keys: Mapping[str, str] = NO_KEYS,
    template: Template | None = None,
) -> list[Sample]:
    """Return the responses of a file as samples to imitate; the stop token is added to each."""
    samples = []
    for number, line in read_lines(path):
        name = f"{path} line {number}"
        is_chat = "messages" in line and key_map.read_field(line, "response", keys) is None
        turns = _chat_turns(name, line, system_prompt) if is_chat else _turns(name, line, system_prompt, keys)
        for index, turn in enumerate(turns):
            sample = _sample(name, turn, tokenizer, max_tokens, template)
            samples.append(dataclasses.replace(sample, rollout=(number, index)))
    return samples


def _turns(name: str, line: Line, system_prompt: str, keys: Mapping[str, str]) -> Iterator[Turn]:
    """Yield the only turn of a line with question and response."""
    question, system = key_map.question_and_system(f"{name}: question", require_field(name, line, "question", keys))
    text = require_field(name, line, "response", keys)
    require_text(name, "question", question)
    require_text(name, "response", text)
    yield Turn([*_system_message(system or system_prompt), {"role": "user", "content": question}], text)


def _chat_turns(name: str, line: Line, system_prompt: str) -> Iterator[Turn]:
    """Yield a turn for each message of the assistant, which must follow one of the user."""
    messages = line["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ConfigError(f"{name}: messages is no list of objects with a role and a non-empty text as content")
    roles = [message["role"] for message in messages]
    rounds = roles[1:] if roles[:1] == ["system"] else roles
    if not rounds or len(rounds) % 2 or rounds != ["user", "assistant"] * (len(rounds) // 2):
        raise ConfigError(
            f"{name} holds messages of {', '.join(roles) or 'nobody'}; expected user and assistant in turn, the last "
            "of the assistant, after at most one of the system"
        )
    opening = _system_message(system_prompt) if rounds is roles else []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield Turn([*opening, *messages[:number]], message["content"])


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) and value[key] for key in ("role", "content")
    )


def _system_message(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _sample(
    name: str, turn: Turn, tokenizer: PreTrainedTokenizerBase, max_tokens: int, template: Template | None
) -> Sample:
    try:
        opening = chat_template.render_messages(tokenizer, turn.messages, template)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if tag := chat_template.repeated_opening(opening, turn.response):
        raise ConfigError(
            f"{name}: the chat template opens {tag} already; remove it from the beginning of the response"
        )
    prompt = tuple(tokenizer.encode(opening, add_special_tokens=False))
    response = (*tokenizer.encode(turn.response, add_special_tokens=False), tokenizer.eos_token_id)
    if len(prompt) + len(response) > max_tokens:
        raise ConfigError(
            f"{name} has {len(prompt) + len(response)} tokens; the model was made for {max_tokens} positions. Shorten "
            "or remove the line"
        )
    return Sample(prompt, response, reward=1.0, advantage=0.0)

"""Prompts as tokens, by the chat template of a model folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import ConfigError
from oreal_megatron.data.user_functions import Template

PROBES = ("1+2=", "3+4=")  # two questions that a template must tell apart
Message = dict[str, str]  # role and content
SHORTEST_ANSWER = r"\boxed{0}"


def render(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str, template: Template | None = None
) -> tuple[int, ...]:
    """Return the tokens of the chat template up to the start of the response; ConfigError where it fails."""
    text = render_text(tokenizer, question, system_prompt, template)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render_text(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str, template: Template | None = None
) -> str:
    """Return the text of the chat template up to the start of the response; ConfigError where it fails.

    `template`: function of the user that takes its place.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return render_messages(tokenizer, [*system, {"role": "user", "content": question}], template)


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Template | None = None
) -> str:
    """Return the text of the chat template up to the start of the next response; ConfigError where it fails."""
    if template:
        *system, question = messages
        if any(message["role"] != "system" for message in system):
            raise ConfigError(
                "data.template renders one question, but this chat has earlier turns; unset it, or split the chat"
            )
        return template(question["content"], system[0]["content"] if system else "")
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program: it may raise anything
        raise ConfigError(f"the chat template cannot render this prompt: {type(error).__name__}: {error}") from None


def check_user_template(tokenizer: PreTrainedTokenizerBase, template: Template, system_prompt: str) -> None:
    """Raise ConfigError for a function of the user that fails, renders nothing, or ignores the question."""
    prompts = {render(tokenizer, question, system_prompt, template) for question in PROBES}
    if () in prompts or len(prompts) < len(PROBES):
        fault = "an empty prompt" if () in prompts else "the same prompt for different questions"
        raise ConfigError(f"data.template renders {fault}; expected a text that holds the question")


def check_template(tokenizer: PreTrainedTokenizerBase, model_path: str, system_prompt: str) -> None:
    """Raise ConfigError for a chat template that is missing, fails, renders nothing, or ignores the question."""
    fix = f"correct {model_path}/chat_template.jinja, or use that of the model's instruction-tuned version"
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{model_path} has no chat template, as is usual for base models; put a chat_template.jinja into the "
            "folder, for example that of the model's instruction-tuned version"
        )
    try:
        prompts = {render(tokenizer, question, system_prompt) for question in PROBES}
    except ConfigError as error:
        if system_prompt and _renders(tokenizer):
            fix = "unset data.system_prompt, which this template refuses, and write its text into the questions"
        raise ConfigError(f"{model_path}: {error}; {fix}") from None
    if () in prompts:
        raise ConfigError(f"{model_path}: the chat template renders an empty prompt; {fix}")
    if len(prompts) < len(PROBES):
        raise ConfigError(f"{model_path}: the chat template renders the same prompt for different questions; {fix}")


def shortest_response(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the shortest boxed answer with its stop token."""
    return len(tokenizer.encode(SHORTEST_ANSWER, add_special_tokens=False)) + 1


def repeated_opening(prompt: str, response: str) -> str:
    """Return the tag that ends the prompt and begins the response as well, such as <think>; "" if there is none."""
    tag = re.search(r"<[^<>\s]+>\s*$", prompt)
    return tag[0].strip() if tag and response.lstrip().startswith(tag[0].strip()) else ""


def _renders(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template renders a question without a system message."""
    try:
        return bool(render(tokenizer, PROBES[0], ""))
    except ConfigError:
        return False

"""Prompts and demonstrations from JSONL files, rendered with the model's chat template.

Invalid lines are reported by number, before any model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from oreal_megatron.config import ConfigError
from oreal_megatron.records import Prompt, Sample
from oreal_megatron.runtime import files


def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; its Python code runs only with trust_remote_code."""
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # for a broken file, transformers raises anything from OSError to KeyError
        raise ConfigError(f"the tokenizer of {model_path} cannot be loaded: {error!r:.300}") from None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model_path: str) -> list[int]:
    """Return the end-of-sequence tokens of the tokenizer and of generation_config.json."""
    file = Path(model_path) / "generation_config.json"
    eos = files.read_object(file).get("eos_token_id", []) if file.is_file() else []
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if not all(isinstance(token, int) for token in stops):
        raise ConfigError(f"{file} has eos_token_id {eos!r}; expected a token id, or a list of them")
    return sorted(stops)


def read_problems(path: str) -> list[dict[str, Any]]:
    """Read lines with `question`, `gold_answer` and, optionally, `pass_rate` in [0, 1].

    Accepts benchmarks' names `problem` and `answer` for the first two, and a number as an answer.
    """
    problems = []
    for number, line in _lines(path):
        for key, alias in (("question", "problem"), ("gold_answer", "answer")):
            if key not in line and alias in line:
                line[key] = line[alias]
        if type(line.get("gold_answer")) in (int, float):  # AIME has numbers; bool is excluded
            line["gold_answer"] = str(line["gold_answer"])
        _require(path, number, line, "question", str)
        _require(path, number, line, "gold_answer", str)
        rate = line.get("pass_rate")
        if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise ConfigError(f"{path} line {number}: pass_rate is {rate!r}; expected a number from 0 to 1, or null")
        problems.append(line)
    return problems


def load_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str, max_prompt_tokens: int
) -> list[Prompt]:
    """Return the problems of a file as prompts; ConfigError for one that leaves no tokens for a response."""
    prompts = []
    for number, line in enumerate(read_problems(path), 1):
        tokens = render(tokenizer, line["question"], system_prompt)
        if len(tokens) > max_prompt_tokens:
            raise ConfigError(
                f"{path} problem {number} renders to {len(tokens)} tokens; engine.max_model_len allows "
                f"{max_prompt_tokens}. Raise it or remove the problem"
            )
        prompts.append(Prompt(number - 1, line["question"], line["gold_answer"], line.get("pass_rate"), tokens))
    return prompts


def load_demonstrations(
    path: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str, max_tokens: int
) -> list[Sample]:
    """Return lines with `question` and `response` as samples to imitate; the stop token is added to the response."""
    samples = []
    for number, line in _lines(path):
        for key in ("question", "response"):
            _require(path, number, line, key, str)
        prompt = render(tokenizer, line["question"], system_prompt)
        response = (*tokenizer.encode(line["response"], add_special_tokens=False), tokenizer.eos_token_id)
        if len(prompt) + len(response) > max_tokens:
            raise ConfigError(
                f"{path} line {number} has {len(prompt) + len(response)} tokens; expected at most "
                f"{max_tokens}. Raise engine.max_model_len or remove the line"
            )
        samples.append(Sample(prompt, response, reward=1.0, advantage=0.0))
    return samples


def render(tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str) -> tuple[int, ...]:
    """Return the tokens of the chat template up to the start of the response."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def check_golds(prompts: list[Prompt], path: str, equals_itself: Callable[[str], bool], drop: bool) -> list[Prompt]:
    """Return the prompts whose gold answer the verifier equates with itself.

    Raises ConfigError for others, or leaves them out with `drop`.
    """
    readable = [equals_itself(prompt.gold) for prompt in prompts]
    unreadable = [prompt for prompt, ok in zip(prompts, readable, strict=True) if not ok]
    if unreadable and not drop:
        listed = "; ".join(f"problem {prompt.id + 1}: {prompt.gold!r}" for prompt in unreadable[:10])
        raise ConfigError(
            f"{path}: the verifier cannot equate {len(unreadable)} gold answers with themselves ({listed}). "
            "Fix them, or leave them out with --set data.drop_unreadable_golds=true"
        )
    return [prompt for prompt, ok in zip(prompts, readable, strict=True) if ok]


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and JSON object of each line that is not blank; ConfigError where there is none."""
    if not Path(path).is_file():
        raise ConfigError(f"data file {path or '(none given)'} does not exist")
    is_empty = True
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(line, dict):
                raise ConfigError(f"{path} line {number} is {type(line).__name__}; expected a JSON object")
            is_empty = False
            yield number, line
    if is_empty:
        raise ConfigError(f"data file {path} is empty")


def _require(path: str, number: int, line: dict[str, Any], key: str, kind: type) -> None:
    """Raise ConfigError where a field is missing, empty or of another type."""
    value = line.get(key)
    if not isinstance(value, kind) or not value:
        raise ConfigError(f"{path} line {number}: {key!r} is {value!r}; expected a non-empty {kind.__name__}")

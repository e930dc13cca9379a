"""Problems from JSONL files, rendered with the model's chat template; bad lines are named before anything is loaded."""

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
    """The tokenizer of a model folder; what Python code the folder brings is run only where it is trusted."""
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a broken file, transformers raises anything from OSError to KeyError
        raise ConfigError(f"the tokenizer of {model_path} cannot be loaded: {error!r:.300}") from None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model_path: str) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of generation_config.json."""
    file = Path(model_path) / "generation_config.json"
    named = files.read_object(file).get("eos_token_id", []) if file.is_file() else []
    stops = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not all(isinstance(token, int) for token in stops):
        raise ConfigError(f"{file} names eos_token_id {named!r}; wanted a token's number, or several")
    return sorted(stops)


def read_problems(path: str) -> list[dict[str, Any]]:
    """Lines with `question`, `gold_answer` and, optionally, `pass_rate` in [0, 1].

    Benchmarks call the first two `problem` and `answer`, which is understood as well, and so is a number as an answer.
    """
    problems = []
    for number, line in _lines(path):
        for ours, theirs in (("question", "problem"), ("gold_answer", "answer")):
            if ours not in line and theirs in line:
                line[ours] = line[theirs]
        if type(line.get("gold_answer")) in (int, float):  # of AIME, and no bool
            line["gold_answer"] = str(line["gold_answer"])
        _require(path, number, line, "question", str)
        _require(path, number, line, "gold_answer", str)
        rate = line.get("pass_rate")
        if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise ConfigError(f"{path} line {number}: pass_rate is {rate!r}; wanted a number from 0 to 1, or null")
        problems.append(line)
    return problems


def load_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str, max_prompt_tokens: int
) -> list[Prompt]:
    """The problems of a file as prompts; refuses one that leaves no room for an answer."""
    prompts = []
    for number, line in enumerate(read_problems(path), 1):
        tokens = render(tokenizer, line["question"], system_prompt)
        if len(tokens) > max_prompt_tokens:
            raise ConfigError(
                f"{path} problem {number} renders to {len(tokens)} tokens; engine.max_model_len leaves room for "
                f"{max_prompt_tokens}. Raise it or remove the problem"
            )
        prompts.append(Prompt(number - 1, line["question"], line["gold_answer"], line.get("pass_rate"), tokens))
    return prompts


def load_demonstrations(
    path: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str, max_tokens: int
) -> list[Sample]:
    """Lines with `question` and `response` as samples to imitate; the response gets the stop token."""
    samples = []
    for number, line in _lines(path):
        for key in ("question", "response"):
            _require(path, number, line, key, str)
        prompt = render(tokenizer, line["question"], system_prompt)
        response = (*tokenizer.encode(line["response"], add_special_tokens=False), tokenizer.eos_token_id)
        if len(prompt) + len(response) > max_tokens:
            raise ConfigError(
                f"{path} line {number} has {len(prompt) + len(response)} tokens; at most {max_tokens} fit"
            )
        samples.append(Sample(prompt, response, reward=1.0, advantage=0.0))
    return samples


def render(tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str) -> tuple[int, ...]:
    """Tokens of the chat template up to where the answer begins."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def check_golds(prompts: list[Prompt], path: str, equals_itself: Callable[[str], bool], drop: bool) -> list[Prompt]:
    """Prompts whose gold answer the verifier accepts as an answer to itself; others are listed, or dropped if told."""
    sound = [equals_itself(prompt.gold) for prompt in prompts]
    bad = [prompt for prompt, fine in zip(prompts, sound, strict=True) if not fine]
    if bad and not drop:
        listed = "; ".join(f"problem {prompt.id + 1}: {prompt.gold!r}" for prompt in bad[:10])
        raise ConfigError(
            f"{path}: the verifier cannot equate {len(bad)} gold answers with themselves ({listed}). "
            "Mend them, or leave them out with --set data.drop_unreadable_golds=true"
        )
    return [prompt for prompt, fine in zip(prompts, sound, strict=True) if fine]


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not Path(path).is_file():
        raise ConfigError(f"data file {path or '(none named)'} does not exist")
    found = False
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(line, dict):
                raise ConfigError(f"{path} line {number} is {type(line).__name__}; wanted a JSON object")
            found = True
            yield number, line
    if not found:
        raise ConfigError(f"data file {path} is empty")


def _require(path: str, number: int, line: dict[str, Any], key: str, kind: type) -> None:
    value = line.get(key)
    if not isinstance(value, kind) or not value:
        raise ConfigError(f"{path} line {number}: {key!r} is {value!r}; wanted a non-empty {kind.__name__}")

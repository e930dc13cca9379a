"""Prompts from data files, rendered with the model's chat template.

Invalid lines are reported by number, before any model is loaded.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from oreal_megatron.config import ConfigError
from oreal_megatron.data import chat_template, golds, key_map
from oreal_megatron.data.lines import Line, read_lines
from oreal_megatron.data.user_functions import Reader, Template
from oreal_megatron.math_equality import read_gold
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed, files

log = logging.getLogger(__name__)
NO_KEYS: Mapping[str, str] = {}
LISTED = 100  # ranges of problem numbers in a message


def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; its Python code runs only with trust_remote_code."""
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # for a broken file, transformers raises anything from OSError to KeyError
        raise ConfigError(f"the tokenizer of {model_path} cannot be loaded: {error!r:.300}") from None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model_path: str, vocabulary: int) -> list[int]:
    """Return the end-of-sequence tokens of the tokenizer and of generation_config.json, all within the vocabulary."""
    file = Path(model_path) / "generation_config.json"
    eos = files.read_object(file).get("eos_token_id") if file.is_file() else None
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise ConfigError(
                f"{file} has eos_token_id {eos!r}; expected token ids of the model's vocabulary, 0 to {vocabulary - 1}"
            )
    return sorted({tokenizer.eos_token_id, *listed})


def read_problems(
    path: str, keys: Mapping[str, str] = NO_KEYS, free_golds: bool = False, reader: Reader | None = None
) -> list[Line]:
    """Read lines with `question`, `gold_answer` and, optionally, `pass_rate` in [0, 1].

    Accepts benchmarks' names `problem` and `answer` for the first two, further names by `keys` (data.keys), chat
    messages as a question, whose system message becomes `system_prompt`, and a number as an answer. A gold answer that
    is a solution gives its answer, one damaged by JSON escapes is repaired; both are logged with their lines. With
    `free_golds` they stay as they are, and may be absent; `row` is the JSON of the line, whose own values stay.
    `reader` is a function of the user that reads the file.
    """
    lines, read = [], {}
    for number, raw in (reader or read_lines)(path):
        line = read_problem(f"{path} line {number}", raw, keys, free_golds)
        if free_golds:
            lines.append(line | {"row": json.dumps(line | raw, default=str)})
            continue
        text = line["gold_answer"]
        gold = read_gold(text)
        if gold.change:
            read[number] = text, gold
        lines.append(line | {"gold_answer": gold.answer})
    golds.report_changes(path, read, number_ranges)
    return lines


def read_problem(name: str, line: Line, keys: Mapping[str, str], free_gold: bool = False) -> Line:
    """Return a line with the fields of a problem under our names; ConfigError where one is missing or invalid."""
    question, system = key_map.question_and_system(f"{name}: question", require_field(name, line, "question", keys))
    rate = key_map.read_field(line, "pass_rate", keys)
    gold = (
        key_map.read_field(line, "gold_answer", keys) if free_gold else require_field(name, line, "gold_answer", keys)
    )
    if (
        isinstance(gold, int | float) and not isinstance(gold, bool) and math.isfinite(gold)
    ):  # AIME has numbers; bool is excluded
        gold = str(gold)
    require_text(name, "question", question)
    if free_gold:
        gold = gold if isinstance(gold, str) else ""  # the function reads it from the row
    else:
        require_text(name, "gold_answer", gold)
    if rate is not None and not (isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1):
        raise ConfigError(f"{name}: pass_rate is {rate!r}; expected a number from 0 to 1, or null")
    return line | {"question": question, "gold_answer": gold, "pass_rate": rate, "system_prompt": system}


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    keys: Mapping[str, str] = NO_KEYS,
    with_rows: bool = False,
    reader: Reader | None = None,
    template: Template | None = None,
) -> list[Prompt]:
    """Return the problems of a file as prompts, in its order; `with_rows`: with all fields, for `verify.function`.

    `reader` and `template`: functions of the user that read the file and render the prompts.
    """
    prompts = []
    for number, line in enumerate(read_problems(path, keys, with_rows, reader), 1):
        name, system = f"{path} problem {number}", line["system_prompt"]
        if system and system_prompt not in ("", system):
            raise ConfigError(f"{name} has a system message of its own, and data.system_prompt is another; unset that")
        try:
            tokens = chat_template.render(tokenizer, line["question"], system or system_prompt, template)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        row = line["row"] if with_rows else ""
        prompts.append(Prompt(number - 1, line["question"], line["gold_answer"], line["pass_rate"], tokens, row))
    return prompts


def is_overlong(prompt: Prompt, max_prompt_tokens: int) -> bool:
    """Return whether a prompt leaves no room for the shortest boxed answer."""
    return len(prompt.tokens) > max_prompt_tokens


def check_lengths(prompts: list[Prompt], path: str, max_prompt_tokens: int, skip: bool) -> list[Prompt]:
    """Return the prompts that leave room for a boxed answer, in their order.

    Raises ConfigError that names all others, or leaves them out with `skip` and says so.
    """
    overlong = [prompt for prompt in prompts if is_overlong(prompt, max_prompt_tokens)]
    if not overlong:
        return prompts
    longest = max(overlong, key=lambda prompt: len(prompt.tokens))
    text = (
        f"{path}: {len(overlong)} of {len(prompts)} problems have more than {max_prompt_tokens} tokens, which leaves "
        f"no room in engine.max_model_len for a boxed answer: {number_ranges(prompt.id + 1 for prompt in overlong)} "
        f"(the longest, {longest.id + 1}, has {len(longest.tokens)} tokens)"
    )
    if not skip or len(overlong) == len(prompts):
        raise ConfigError(f"{text}. Raise it, or leave these problems out with --set data.filter_overlong=true")
    if distributed.rank() == 0:
        log.warning("%s; they are left out (data.filter_overlong)", text)
    return [prompt for prompt in prompts if not is_overlong(prompt, max_prompt_tokens)]


def number_ranges(numbers: Iterable[int]) -> str:
    """Return rising numbers as text, consecutive ones as a range: 3, 7-9, 12."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    texts = ["-".join(map(str, ends)) for ends in ranges]
    more = f" and {len(texts) - LISTED} further places" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more


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


def require_field(name: str, line: Line, field: str, keys: Mapping[str, str]) -> Any:
    """Return a field of a line; ConfigError names the keys of a line that lacks it."""
    value = key_map.read_field(line, field, keys)
    if value is None:
        raise ConfigError(key_map.describe_missing(name, line, field))
    return value


def require_text(name: str, field: str, value: object) -> None:
    """Raise ConfigError where a field is no text, or an empty one."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}: {field!r} is {value!r}; expected a non-empty text")

"""Data files of every form: what is read, what is refused, and that a refusal names file, line and remedy."""

from __future__ import annotations

import json
import random
import string
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError, DataConfig, validate
from oreal_megatron.config import problems as config_problems
from oreal_megatron.data import chat_template, key_map, lines, problems, sampler

OURS = {"question": "1+2=", "gold_answer": "3"}
VERL = {
    "data_source": "x",
    "prompt": [{"role": "user", "content": "1+2="}],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 0},
}
VERL_KEYS = {"question": "prompt", "gold_answer": "reward_model.ground_truth"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"question":"1+2= \\ud800","gold_answer":"3"}', "half of a character"),
        ('{"question":"1+2=","gold_answer":"3","other":{"deep":["\\uDFFF"]}}', "half of a character"),
        ('{"question":"1+2=","\\ud83d":"3","gold_answer":"3"}', "half of a character"),
        ('{"question":"1+2=","gold_answer":NaN}', "NaN is no JSON value; write null"),
        ('{"question":"1+2=","gold_answer":"3","pass_rate":NaN}', "NaN is no JSON value"),
        ('{"question":"1+2=","gold_answer":-Infinity}', "-Infinity is no JSON value"),
        ('{"question":"1+2=","gold_answer":1e999}', "'gold_answer' is inf"),
        ('{"question":"1+2=","gold_answer":true}', "'gold_answer' is True"),
        ('{"question":" \\t","gold_answer":"3"}', "'question' is ' .*'; expected a non-empty text"),
        ('{"question":"1+2=","gold_answer":"\\u3000"}', "'gold_answer' is .*; expected a non-empty text"),
        ('{"question":"1+2=","gold_answer":"3","pass_rate":true}', "pass_rate is True; expected a number from 0 to 1"),
        ('{"question":"1+2=","gold_answer":"3","pass_rate":"0.5"}', "pass_rate is '0.5'"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"question":"1+2=","gold_answer":"3","x":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question":"1+2=","gold_answer":' + "9" * 6000 + "}", "is not JSON"),
        ('{"question":["1+2="],"gold_answer":"3"}', "question holds messages of None"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, bad, says):
    path = write(tmp_path / "data.jsonl", OURS, "", bad)
    with pytest.raises(ConfigError, match=f"^{path} line 3.*{says}"):
        problems.read_problems(path)


def test_a_whole_character_in_two_escapes_is_read(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"question":"\\ud83d\\ude00","gold_answer":"3"}')
    assert problems.read_problems(path)[0]["question"] == "\U0001f600"


names = st.text(string.ascii_lowercase, min_size=1, max_size=6)


@settings_of_hypothesis(max_examples=40)
@given(
    path=st.lists(names, min_size=1, max_size=3),
    gold=st.text(min_size=1).filter(lambda t: t.isprintable() and t.strip()),
)
def test_a_key_path_finds_the_value_wherever_it_is(path, gold):
    line = {"zz question": "q"}
    inner = line
    for key in path[:-1]:
        inner = inner.setdefault(f"zz {key}", {})
    inner[f"zz {path[-1]}"] = gold
    keys = {"question": "zz question", "gold_answer": ".".join(f"zz {key}" for key in path)}
    assert key_map.read_field(line, "gold_answer", keys) == gold
    assert key_map.read_field({keys["gold_answer"]: gold}, "gold_answer", keys) == gold, "dots in a flat key"
    assert key_map.read_field({"answer": gold}, "gold_answer", keys) == gold, "a file with our names needs no map"
    assert key_map.read_field({"other": gold}, "gold_answer", keys) is None
    assert all(key in key_map.describe_missing("f line 1", line, "response") for key in keys.values())


def test_lines_of_another_trainer_are_refused_with_their_keys_and_read_by_the_map_that_is_suggested(tmp_path):
    path = write(tmp_path / "verl.jsonl", VERL)
    with pytest.raises(ConfigError) as refusal:
        problems.read_problems(path)
    assert "line 1 has no value for 'question'; its keys are data_source, prompt, reward_model.style" in str(
        refusal.value
    )
    assert str(refusal.value).endswith("--set data.keys.question=prompt")
    with pytest.raises(ConfigError, match="--set data.keys.gold_answer=reward_model.ground_truth$"):
        problems.read_problems(path, {"question": "prompt"})
    (line,) = problems.read_problems(path, VERL_KEYS)
    assert (line["question"], line["gold_answer"], line["system_prompt"]) == ("1+2=", "3", "")
    assignments = [f"data.keys.{field}={key}" for field, key in VERL_KEYS.items()]
    config = settings.override(Config(), assignments)
    assert config.data.keys == VERL_KEYS
    assert settings.from_dict(json.loads(json.dumps({"data": {"keys": VERL_KEYS}}))).data.keys == VERL_KEYS
    validate(config)


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"asked_for": "prompt"}, "keys.asked_for is unknown; expected one of question"), ({"question": 3}, "is 3")],
)
def test_a_map_of_unknown_fields_is_refused(keys, says):
    assert says in config_problems(Config(data=DataConfig(keys=keys)))[0]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages of user, assistant"),
        ([{"role": "user", "content": "a"}] * 2, "messages of user, user"),
        ([], "messages of nobody"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages of user; expected .* text as content"),
    ],
)
def test_a_conversation_is_no_question(tmp_path, messages, says):
    path = write(tmp_path / "chat.jsonl", VERL | {"prompt": messages})
    with pytest.raises(ConfigError, match=says):
        problems.read_problems(path, VERL_KEYS)


def test_a_system_message_of_a_line_is_rendered_and_conflicts_with_another_in_the_recipe(tmp_path, model_folder):
    tokenizer = problems.load_tokenizer(str(model_folder))
    system = {"role": "system", "content": "box it"}
    path = write(tmp_path / "verl.jsonl", VERL | {"prompt": [system, *VERL["prompt"]]})
    (prompt,) = problems.load_prompts(path, tokenizer, "", VERL_KEYS)
    assert prompt.tokens == chat_template.render(tokenizer, "1+2=", "box it") and prompt.question == "1+2="
    assert problems.load_prompts(path, tokenizer, "box it", VERL_KEYS) == [prompt]
    with pytest.raises(ConfigError, match="problem 1 has a system message of its own"):
        problems.load_prompts(path, tokenizer, "no box", VERL_KEYS)


def test_parquet_is_read_where_pyarrow_is_and_refused_in_a_sentence_where_it_is_not(tmp_path, monkeypatch):
    path = write(tmp_path / "data.parquet", "not looked at")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow"):
        problems.read_problems(path)

    class Table:
        def to_pylist(self):
            return [VERL, VERL | {"reward_model": {"ground_truth": None}}]

    fake = types.ModuleType("pyarrow")
    fake.parquet = types.SimpleNamespace(read_table=lambda file: Table())
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    with pytest.raises(ConfigError, match="line 2 has no value for 'gold_answer'"):
        problems.read_problems(path, VERL_KEYS)
    Table.to_pylist = lambda self: [VERL] * 3
    assert len(problems.read_problems(path, VERL_KEYS)) == 3
    fake.parquet.read_table = lambda file: 1 / 0
    with pytest.raises(ConfigError, match="cannot be read as Parquet: division by zero"):
        problems.read_problems(path, VERL_KEYS)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "openai/gsm8k",
            "does not exist; for a dataset of the Hugging Face hub name a file of it: hub:openai/gsm8k:FILE",
        ),
        ("data/missing.jsonl", "does not exist$"),
        ("", "none given"),
        ("hub:openai/gsm8k", "expected hub:OWNER/DATASET:FILE"),
        ("hub::x.jsonl", "expected hub:OWNER/DATASET:FILE"),
        (".", "is a folder"),
    ],
)
def test_a_name_without_a_file_says_what_is_expected(path, says):
    with pytest.raises(ConfigError, match=says):
        list(lines.read_lines(path))


def prompts_of_lengths(lengths: list[int]) -> list[problems.Prompt]:
    return [problems.Prompt(i, "q", "1", None, (1,) * length) for i, length in enumerate(lengths)]


@settings_of_hypothesis(max_examples=60)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), most=st.integers(1, 20))
def test_every_problem_without_room_is_named_and_filtering_keeps_the_others_in_order(lengths, most):
    prompts, too_long = prompts_of_lengths(lengths), [i + 1 for i, length in enumerate(lengths) if length > most]
    if not too_long:
        assert problems.check_lengths(prompts, "f", most, skip=False) == prompts
        return
    with pytest.raises(ConfigError) as refusal:
        problems.check_lengths(prompts, "f", most, skip=False)
    text = str(refusal.value).split("boxed answer: ")[1].split(" (")[0]
    named = [
        n for part in text.split(", ") for a, _, b in [part.partition("-")] for n in range(int(a), int(b or a) + 1)
    ]
    assert named == too_long and f"{len(too_long)} of {len(lengths)} problems" in str(refusal.value)
    if len(too_long) == len(lengths):
        with pytest.raises(ConfigError):
            problems.check_lengths(prompts, "f", most, skip=True)
    else:
        fitting = problems.check_lengths(prompts, "f", most, skip=True)
        assert fitting == [prompt for prompt in prompts if len(prompt.tokens) <= most]


def test_a_message_does_not_grow_without_end():
    numbers = sorted(random.Random(0).sample(range(10**6), 5000))
    text = problems.number_ranges(numbers)
    assert len(text) < 1500 and text.endswith("further places")


@pytest.mark.parametrize(("count", "per_step", "warned"), [(3, 8, True), (8, 8, False), (7, 8, True), (1, 1, False)])
def test_fewer_problems_than_a_step_takes_are_used_repeatedly_and_that_is_said(count, per_step, warned, caplog):
    config = DataConfig("f.jsonl", prompts_per_step=per_step)
    taken = sampler.balanced(prompts_of_lengths([1] * count), config, seed=0)
    assert len(taken.take(0)) == per_step and {prompt.id for prompt in taken.take(0)} <= set(range(count))
    assert ("every step uses some of them more than once" in caplog.text) == warned

"""Chat templates and stop tokens that cannot work are refused before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from oreal_megatron.config import Config, ConfigError, DataConfig, EngineConfig, ModelConfig, SamplingConfig
from oreal_megatron.data import chat_template, demonstration_lines, problems
from oreal_megatron.session.inputs import Inputs, read_inputs

PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)
LIMIT = "{% if messages[-1]['content'] | length > 9 %}{{ raise_exception('too long') }}{% endif %}" + PLAIN


def copied(folder: Path, target: Path, template: str | None, **generation: object) -> str:
    copy = target / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    if generation:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    return str(copy)


def config_of(model: str, system_prompt: str = "", max_model_len: int = 64, max_new_tokens: int = 16) -> Config:
    return Config(
        model=ModelConfig(model),
        engine=EngineConfig(max_model_len=max_model_len),
        sampling=SamplingConfig(max_new_tokens=max_new_tokens),
        data=DataConfig(system_prompt=system_prompt),
    )


@pytest.mark.parametrize(
    ("template", "system_prompt", "says"),
    [
        (None, "", "has no chat template, as is usual for base models; put a chat_template.jinja"),
        ("", "", "has no chat template"),
        ("{% for m in %}", "", "chat template cannot render this prompt: TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "", "cannot render this prompt: TypeError.*correct .*chat_template.jinja"),
        ("{{ raise_exception('never') }}", "x", "cannot render this prompt: TemplateError: never; correct"),
        (REFUSING, "Box it.", "System role not supported; unset data.system_prompt, which this template refuses"),
        ("{# nothing #}", "", "renders an empty prompt"),
        ("<|user|>", "", "renders the same prompt for different questions"),
    ],
)
def test_a_template_that_cannot_work_is_refused(model_folder, tmp_path, template, system_prompt, says):
    with pytest.raises(ConfigError, match=says):
        read_inputs(config_of(copied(model_folder, tmp_path, template), system_prompt))


def test_a_template_that_refuses_one_problem_names_it(model_folder, tmp_path):
    inputs = read_inputs(config_of(copied(model_folder, tmp_path, LIMIT)))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": "1+" * n + "1", "gold_answer": "1"}) + "\n" for n in (1, 2, 9)))
    with pytest.raises(ConfigError, match=f"{path} problem 3: the chat template cannot render .*too long"):
        inputs.rendered(str(path))


@pytest.mark.parametrize("eos", [128001, [3, 128001], -1, [True], 1.0, "3", {"a": 1}])
def test_a_stop_token_that_is_no_token_is_refused(model_folder, tmp_path, eos):
    with pytest.raises(ConfigError, match=r"generation_config.json has eos_token_id .*0 to 127"):
        read_inputs(config_of(copied(model_folder, tmp_path, PLAIN, eos_token_id=eos)))


def test_stop_tokens_of_tokenizer_and_generation_config_are_joined(model_folder, tmp_path):
    model = copied(model_folder, tmp_path, PLAIN, eos_token_id=[127, 5])
    assert read_inputs(config_of(model)).stop_tokens == [3, 5, 127]


@pytest.fixture
def inputs(model_folder) -> Inputs:
    return read_inputs(config_of(str(model_folder)))


def write_questions(path: Path, *lengths: int) -> str:
    """Problems whose prompts have so many tokens: each character is one, and two belong to the template."""
    path.write_text("".join(json.dumps({"question": "1" * (n - 2), "gold_answer": "1"}) + "\n" for n in lengths))
    return str(path)


def test_room_for_less_than_a_boxed_answer_is_no_room(inputs, tmp_path):
    shortest = len(r"\boxed{0}") + 1  # a token per character, and the stop token
    assert chat_template.shortest_response(inputs.tokenizer) == shortest
    path = write_questions(tmp_path / "data.jsonl", 10, 64 - shortest, 65 - shortest, 63)
    with pytest.raises(ConfigError, match=r"2 of 4 problems .* boxed answer: 3-4 \(the longest, 4, has 63 tokens\)"):
        inputs.prompts(path)


def test_a_limit_that_no_response_can_reach_is_refused_and_one_that_some_cannot_is_named(inputs, tmp_path, caplog):
    def training_prompts(*lengths: int) -> int:
        path = write_questions(tmp_path / "data.jsonl", *lengths)
        config = inputs.config
        data = DataConfig(path)
        return len(
            Inputs(
                config.__class__(**vars(config) | {"data": data}), *list(vars(inputs).values())[1:]
            ).training_prompts()
        )

    assert training_prompts(10, 48) == 2 and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert training_prompts(10, 49, 50) == 3
    assert "responses to 2 of 3 prompts are cut off earlier" in caplog.text
    with pytest.raises(ConfigError, match="every response would be cut off.*Raise engine.max_model_len to at least 66"):
        training_prompts(49, 50)


@pytest.mark.parametrize(
    ("prompt", "response", "tag"),
    [
        ("<|user|>q<|assistant|><think>\n", "<think>\nwell", "<think>"),
        ("<|user|>q<|assistant|><think>\n", "well</think>", ""),
        ("<|user|>q<|assistant|>", "<think>well", ""),
        ("<|user|>q<|assistant|>", "<|assistant|>7", "<|assistant|>"),
        ("q: 1 < 2 and 3 > 2", "3 > 2", ""),
    ],
)
def test_a_response_that_repeats_what_the_template_opens_is_noticed(prompt, response, tag):
    assert chat_template.repeated_opening(prompt, response) == tag


def test_a_demonstration_that_repeats_the_opening_of_the_template_is_refused(model_folder, tmp_path):
    model = copied(model_folder, tmp_path, PLAIN + "<|assistant|><think>")
    tokenizer = problems.load_tokenizer(model)
    path = tmp_path / "sft.jsonl"
    lines = [{"question": "1+2=", "response": text} for text in ("hm</think>3", "<think>hm</think>3")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    (sample,) = demonstration_lines.load_demonstrations(str(path), tokenizer, "", 512)
    text = tokenizer.decode((*sample.prompt_tokens, *sample.response_tokens))
    assert text == "<|user|>1+2=<|assistant|><think>hm</think>3<|end|>"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="line 2: the chat template opens <think> already"):
        demonstration_lines.load_demonstrations(str(path), tokenizer, "", 512)


def chat(*contents: str, system: str = "") -> dict:
    """A line with a chat, the user first."""
    roles = ["system"] * bool(system) + ["user", "assistant"] * len(contents)
    texts = [system] * bool(system) + list(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def read_chats(folder: Path, tmp_path: Path, *lines: dict, system_prompt: str = "", longest: int = 512) -> list:
    """The samples of a file, as texts of prompt and response."""
    tokenizer, path = problems.load_tokenizer(str(folder)), tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = demonstration_lines.load_demonstrations(str(path), tokenizer, system_prompt, longest)
    answered = [
        [m["role"] for m in line["messages"]].count("assistant") if "response" not in line else 1 for line in lines
    ]
    lines_and_turns = [(number, turn) for number, count in enumerate(answered, 1) for turn in range(count)]
    assert [sample.rollout for sample in samples] == lines_and_turns
    return [(tokenizer.decode(sample.prompt_tokens), tokenizer.decode(sample.response_tokens)) for sample in samples]


def test_every_message_of_the_assistant_is_a_sample_after_the_messages_before_it(model_folder, tmp_path):
    lines = [chat("1+1=", "2", "4+1=", "3"), {"question": "5", "response": "6", "messages": "of another program"}]
    plain = [
        ("<|user|>1+1=<|assistant|>", "2<|end|>"),
        ("<|user|>1+1=<|assistant|>2<|user|>4+1=<|assistant|>", "3<|end|>"),
    ]
    assert read_chats(model_folder, tmp_path, *lines) == [*plain, ("<|user|>5<|assistant|>", "6<|end|>")]
    single = read_chats(model_folder, tmp_path, chat("1+1=", "2"), system_prompt="7")
    assert single == read_chats(model_folder, tmp_path, {"question": "1+1=", "response": "2"}, system_prompt="7")
    assert read_chats(model_folder, tmp_path, chat("1", "2", system="7"), system_prompt="8") == read_chats(
        model_folder, tmp_path, chat("1", "2"), system_prompt="7"
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (chat("1"), "holds messages of user; expected user and assistant in turn"),
        (chat("1", "2", "3"), "holds messages of user, assistant, user; expected"),
        ({"messages": chat("1", "2")["messages"][::-1]}, "holds messages of assistant, user; expected"),
        ({"messages": []}, "holds messages of nobody; expected"),
        (chat("1", ""), "messages is no list of objects with a role and a non-empty text"),
        ({"messages": "1"}, "messages is no list of objects with a role and a non-empty text"),
        (chat("1", "2", "3" * 20, "4"), "line 2 has 28 tokens; the model was made for 20 positions"),
        ({"question": "1"}, "has no value for 'response'"),
    ],
)
def test_a_chat_that_cannot_be_imitated_is_refused(line, says, model_folder, tmp_path):
    with pytest.raises(ConfigError, match=says):
        read_chats(model_folder, tmp_path, chat("1", "2"), line, longest=20)

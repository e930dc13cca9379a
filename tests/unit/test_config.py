"""Every key of the configuration declares its meaning and bounds, and what is outside them is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import oreal_kernels
import pytest

import oreal_megatron
from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.algo import advantages
from oreal_megatron.cli import main
from oreal_megatron.config import schema

ROOT = Path(__file__).parent.parent.parent
ENTRIES = {entry.path: entry for entry in schema.config_keys(c.Config())}
NUMBERS = [path for path, entry in ENTRIES.items() if {int, float} & {entry.hint, *typing.get_args(entry.hint)}]
CHOICES = [path for path, entry in ENTRIES.items() if typing.get_origin(entry.hint) is typing.Literal]


def with_value(path: str, value: object) -> c.Config:
    """Return the default configuration with one other value, whatever it is."""

    def replaced(section: c.Section, keys: list[str]) -> c.Section:
        key, *rest = keys
        return dataclasses.replace(section, **{key: replaced(getattr(section, key), rest) if rest else value})

    return replaced(c.Config(), path.split("."))


def problem(path: str, value: object) -> str | None:
    return next(entry for entry in schema.config_keys(with_value(path, value)) if entry.path == path).problem()


def just_outside(path: str, bound: float, direction: int) -> float:
    whole = ENTRIES[path].hint is int
    return int(bound) + direction if whole else math.nextafter(bound, direction * math.inf)


@pytest.mark.parametrize("path", ENTRIES)
def test_every_key_declares_what_it_means(path):
    key = ENTRIES[path].key
    assert 4 < len(key.meaning) < 110 and not key.meaning.endswith("."), "one line for a table and for messages"


def test_every_number_has_a_lower_bound_at_least():
    assert len(NUMBERS) > 70
    assert [path for path in NUMBERS if ENTRIES[path].key.low is None] == []


@pytest.mark.parametrize("path", NUMBERS)
def test_a_bound_is_accepted_and_the_next_number_is_refused_by_name(path):
    key = ENTRIES[path].key
    for bound, direction in ((key.low, -1), (key.high, +1)):
        if bound is not None:
            assert problem(path, int(bound) if ENTRIES[path].hint is int else bound) is None
            outside = just_outside(path, bound, direction)
            with pytest.raises(c.ConfigError, match=rf"^{path} is .*; expected {re.escape(key.bounds)}"):
                c.validate(with_value(path, outside))
    for strange in (math.nan, math.inf, -math.inf, "1", True):
        assert problem(path, strange), f"{path} accepts {strange!r}"


@pytest.mark.parametrize(
    "path", [path for path, entry in ENTRIES.items() if typing.get_origin(entry.hint) is typing.Literal]
)
def test_a_choice_names_the_known_ones(path):
    choices = typing.get_args(ENTRIES[path].hint)
    assert all(problem(path, choice) is None for choice in choices)
    with pytest.raises(c.ConfigError, match=rf"^{path} is 'other'; expected one of .*{choices[-1]}"):
        c.validate(with_value(path, "other"))


def test_choices_are_those_that_the_code_knows():
    assert typing.get_args(ENTRIES["loss.kl_kind"].hint) == tuple(oreal_kernels.KL_KINDS)
    assert typing.get_args(ENTRIES["selection.advantage"].hint) == tuple(advantages.KINDS)


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["parallel.tensor=0"], "parallel.tensor is 0; expected at least 1"),
        (["parallel.pipeline=-1"], "parallel.pipeline is -1"),
        (["engine.tensor=0"], "engine.tensor is 0"),
        (["engine.max_num_seqs=0"], "engine.max_num_seqs is 0"),
        (["checkpoint.keep=-1"], "checkpoint.keep is -1"),
        (["checkpoint.every=-1"], "checkpoint.every is -1"),
        (["optimizer.clip_grad=-1"], "optimizer.clip_grad is -1"),
        (["optimizer.lr=-0.001"], "optimizer.lr is -0.001; expected 0 to 10"),
        (["reward_model.optimizer.adam_beta1=1.5"], "reward_model.optimizer.adam_beta1 is 1.5"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay is -1"),
        (["loss.kl_coef=-1"], "loss.kl_coef is -1"),
        (["verify.workers=0"], "verify.workers is 0"),
        (["verify.timeout_s=0"], "verify.timeout_s is 0; expected 0.01 to 3600 s"),
        (["tokens_per_micro_batch=0"], "tokens_per_micro_batch is 0"),
        (["evaluation.problems=-1"], "evaluation.problems is -1"),
        (["evaluation.max_new_tokens=0"], "evaluation.max_new_tokens is 0"),
        (["data.buckets=[[0,1]]"], "data.buckets is ((0, 1),); expected tuple of (float, float, int)"),
        (["data.buckets=[[0.5,0.5,1]]"], "data.buckets holds (0.5, 0.5, 1); expected (low, high, times)"),
        (["data.buckets=[]"], "data.buckets is empty"),
        (["steps=11", "optimizer.warmup_steps=12"], "optimizer.warmup_steps is 12, but its schedule has only 11 steps"),
        (["steps=12", "policy_schedule=updates"],
         "optimizer.warmup_steps is 10, but its schedule has only 2 steps (steps - policy_freeze_steps)"),
        (["steps=9", "policy_freeze_steps=0"], "reward_model.optimizer.warmup_steps is 10, but its schedule has"),
        (["weights.shuffle=true", "reward_model.enabled=false"], "there are no weights to permute"),
        (["supervised.path=x", "supervised.steps=9"], "supervised.optimizer.warmup_steps is 10, but only 9 updates"),
        (["loss.positive_coef=0", "loss.negative_coef=0"], "the KL divergence alone keeps the policy where it starts"),
        (["optimizer.lr=0", "optimizer.min_lr=0"], "optimizer.lr is 0: the policy would never change"),
        (["reward_model.optimizer.lr=0", "reward_model.optimizer.min_lr=0"],
         "reward_model.optimizer.lr is 0: a new reward model would never learn"),
        (["supervised.path=x", "supervised.optimizer.lr=0", "supervised.optimizer.min_lr=0"],
         "supervised.optimizer.lr is 0"),
        (["reward_training.path=x", "reward_training.optimizer.lr=0", "reward_training.optimizer.min_lr=0"],
         "reward_training.optimizer.lr is 0"),
        (["verify.thinking_end=('</think>','')"], "verify.thinking_end is ('</think>', ''), with an empty word"),
        (["run="], "run is ''; expected the path of a folder"),
        (["run=~/runs/a"], "run is '~/runs/a'; expected the path of a folder, written out"),
        (["verify.judge.urls=['ftp://h']"], "verify.judge.urls holds 'ftp://h'; expected http://HOST:PORT"),
        (["optimizer.lr=1e-8"], "optimizer.min_lr is 1e-07, above optimizer.lr"),
        (["seed=-1", "gpus=-1"], "the configuration has 2 problems:\n  gpus is -1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(assignments, says):
    with pytest.raises(c.ConfigError) as error:
        c.validate(settings.override(c.Config(), assignments))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "assignments",
    [
        ["loss.positive_coef=0", "loss.negative_coef=0", "loss.entropy_coef=0.1"],
        ["reward_model.optimizer.lr=0", "reward_model.optimizer.min_lr=0", "reward_model.path=x"],  # stays as it is
        ["reward_model.optimizer.lr=0", "reward_model.optimizer.min_lr=0", "reward_model.enabled=false"],
        ["supervised.optimizer.lr=0", "supervised.optimizer.min_lr=0"],  # nothing is fine-tuned
        ["verify.thinking_end=()", "verify.judge.urls=['https://h/v1']"],
    ],
)
def test_zeros_that_mean_something_are_accepted(assignments):
    c.validate(settings.override(c.Config(), assignments))


def test_a_warm_up_as_long_as_the_run_is_accepted():
    c.validate(settings.override(c.Config(), ["steps=20", "reward_model.optimizer.warmup_steps=20"]))
    c.validate(settings.override(c.Config(), ["steps=10", "reward_model.enabled=false"]))
    c.validate(settings.override(c.Config(), ["steps=12"]))  # the warm-up runs in the 10 frozen steps


def test_the_reference_page_is_what_the_declarations_say():
    spec = importlib.util.spec_from_file_location("make_config_reference", ROOT / "tools/make_config_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.page(), "run python tools/make_config_reference.py"


def test_the_command_lists_every_key_with_the_values_of_a_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("OREAL_JUDGE_URLS", raising=False)
    assert main.main(["config", f"{ROOT}/examples/recipes/oreal.py:oreal_7b", "--set", "optimizer.lr=1e-6"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f"\n{path} = " in f"\n{shown}" for path in ENTRIES)
    assert "optimizer.lr = 1e-06\n    peak learning rate (float, 0 to 10, default 5e-07)" in shown
    assert main.main(["config", "--json"]) == 0
    objects = {one["key"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(objects) == list(ENTRIES)
    assert objects["verify.timeout_s"] == {
        "key": "verify.timeout_s", "value": 2.0, "default": 2.0, "type": "float", "low": 0.01, "high": 3600.0,
        "unit": "s", "on_resume": "announced", "meaning": ENTRIES["verify.timeout_s"].key.meaning,
    }  # fmt: skip


def test_the_command_shows_what_is_wrong_with_a_value_beside_the_others(capsys):
    assert main.main(["config", "--set", "loss.kl_coef=-1"]) == 2
    shown = capsys.readouterr()
    assert "loss.kl_coef = -1.0\n" in shown.out and "oreal config: loss.kl_coef is -1; expected at least 0" in shown.err


def test_the_version_and_counts_that_cannot_be(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"oreal-megatron {oreal_megatron.__version__}\n"
    for arguments in (["--processes", "-1"], ["--processes", "0"], ["--nodes", "0"], ["--max-restarts", "-1"]):
        with pytest.raises(SystemExit) as end:
            main.main([*arguments, "config"])
        assert end.value.code == 2 and "expected a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, *main.COMMANDS])
def test_help_fits_a_narrow_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = main.parser(command)
    text = parser.format_help()
    if command:
        choices = next(action.choices for action in parser._actions if action.dest == "command")
        text = choices[command].format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_the_shell_completes_commands_and_keys(tmp_path):
    pytest.importorskip("argcomplete")
    for line, expected in (("oreal tra", "train"), ("oreal train x --set optimizer.l", "optimizer.lr=")):
        shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        shell |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n"}
        subprocess.run([sys.executable, "-m", "oreal_megatron"], env=os.environ | shell, check=True)
        assert (tmp_path / "out").read_text().strip() == expected


def test_further_arguments_reach_vllm_unless_a_setting_decides_them():
    config = settings.override(
        c.Config(), ["engine.vllm.max_num_batched_tokens=8192", "engine.vllm.async_scheduling=false"]
    )
    assert config.engine.vllm == {"max_num_batched_tokens": 8192, "async_scheduling": False}
    schema.validate(config)
    for name, fix in (("max_num_seqs", "set engine.max_num_seqs instead"), ("logprobs_mode", "remove it")):
        with pytest.raises(c.ConfigError, match=f"engine.vllm gives {name}, which is not free; {fix}"):
            schema.validate(settings.override(c.Config(), [f"engine.vllm.{name}=1"]))

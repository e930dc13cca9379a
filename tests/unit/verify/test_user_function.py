"""A reward of the user in the killable workers: each outcome, each failure, and the fields of the data."""

from __future__ import annotations

import json

import pytest

from oreal_megatron import config as c
from oreal_megatron.algo import selection
from oreal_megatron.config import Config, ConfigError, VerifyConfig
from oreal_megatron.config.user_functions import check_functions
from oreal_megatron.data import problems
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict
from oreal_megatron.verify.grader import Grader
from oreal_megatron.verify.step_verifier import StepVerifier
from oreal_megatron.verify.worker_pool import PoolBroken

REWARDS = """
import os, sys, time

def reward(row, response):
    print("noise on the standard output", row)
    os.write(1, b"and below Python")
    assert sys.stdin.read() == "", "no line of another rollout"
    match response:
        case "yes": return row["wish"] == "yes"
        case "no": return False
        case "none": return None
        case "number": return 0.5
        case "below": return -0.25
        case "zero": return 0.0
        case "large": return 1.5
        case "nan": return float("nan")
        case "one": return 1
        case "raises": raise KeyError("of the user")
        case "sleeps": time.sleep(60)
        case "hogs": return len(bytearray(8 * 2**30)) > 0
        case "exits": os._exit(3)
        case "quits": sys.exit(3)
"""
CASES = {
    "yes": (Outcome.CORRECT, "function", ""),
    "no": (Outcome.INCORRECT, "function", ""),
    "none": (Outcome.UNKNOWN, "function", "returned None"),
    "number": (Outcome.CORRECT, "function", ""),
    "below": (Outcome.INCORRECT, "function", ""),
    "zero": (Outcome.UNKNOWN, "error", "returned 0.0; expected True, False, None for unknown, or a float"),
    "large": (Outcome.UNKNOWN, "error", "returned 1.5; expected"),
    "nan": (Outcome.UNKNOWN, "error", "returned nan; expected"),
    "one": (Outcome.UNKNOWN, "error", "returned 1; expected"),
    "raises": (Outcome.UNKNOWN, "error", "KeyError: 'of the user'"),
    "sleeps": (Outcome.UNKNOWN, "time-out", "verify.timeout_s"),
    "hogs": (Outcome.UNKNOWN, "error", "verify.memory_mib"),
    "exits": (Outcome.UNKNOWN, "error", "a grading process failed"),
    "quits": (Outcome.UNKNOWN, "error", "a grading process failed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards")
    (path / "rewards.py").write_text(REWARDS)
    return path


def test_every_outcome_and_failure_of_a_function_is_a_verdict_of_its_rollout(folder):
    config = VerifyConfig(function=f"{folder}/rewards.py:reward", workers=2, timeout_s=1.0, memory_mib=512)
    verifier = StepVerifier(Grader(config), unknown_limit=1.0)
    prompt = Prompt(0, "q", "", None, (1,), json.dumps({"wish": "yes"}))
    rows = [[Rollout(prompt, slot, 0, (5,), text, True)] for slot, text in enumerate(CASES)]
    rows.append([Rollout(prompt, len(CASES), 0, (5,), "yes", False)])
    try:
        for row in rows:
            verifier.submit(row[0])
        verdicts = [row[0] for row in verifier.verdicts(rows)]
    finally:
        verifier.close()
    for text, verdict in zip(CASES, verdicts, strict=False):
        outcome, method, reason = CASES[text]
        assert (verdict.outcome, verdict.method) == (outcome, method), text
        assert reason in verdict.reason and bool(reason) == bool(verdict.reason), (text, verdict.reason)
    rewards = {text: verdict.reward for text, verdict in zip(CASES, verdicts, strict=False)}
    assert {text: reward for text, reward in rewards.items() if reward is not None} == {"number": 0.5, "below": -0.25}
    assert (verdicts[-1].outcome, verdicts[-1].method) == (Outcome.INCORRECT, "truncated")


def test_a_file_that_workers_cannot_run_ends_with_the_command_that_shows_why(folder):
    (folder / "broken.py").write_text("import os\nif 'worker' in ' '.join(__import__('sys').argv): os._exit(1)\n")
    with Grader(VerifyConfig(function=f"{folder}/broken.py:reward", workers=1)) as grader:
        future = grader.submit("", "text", row="{}")
        with pytest.raises(PoolBroken, match=r"worker_process .*broken.py:reward < /dev/null"):
            future.result(timeout=60)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def reward(response): ...", "with these 2 arguments: too many positional arguments"),
        ("def reward(row, response, more): ...", "with these 2 arguments: missing a required argument: 'more'"),
        ("reward = 1", "has no function 'reward'"),
        ("import no_such_module", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_a_wrong_function_is_refused_by_name(folder, text, says):
    (folder / "wrong.py").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        check_functions(Config(verify=VerifyConfig(function=f"{folder}/wrong.py:reward")))
    assert "wrong.py" in str(error.value)


def test_a_function_and_a_judge_exclude_each_other():
    verify = VerifyConfig(function="x.py:f", judge=c.JudgeConfig(urls=("http://h:1",)))
    with pytest.raises(ConfigError, match=r"verify.function decides alone, but verify.judge.urls names a judge"):
        c.validate(Config(verify=verify))


LINES = (
    {"question": "q", "tests": ["assert f(1) == 2"], "domain": "code"},
    {"question": "q", "gold_answer": "\\frac{1", "deep": {"a": [1, None]}},
    {"question": "q", "gold_answer": 7},
)


def test_the_function_sees_all_fields_and_gold_answers_are_free(tmp_path, model_folder):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    tokenizer = problems.load_tokenizer(str(model_folder))
    prompts = problems.load_prompts(str(tmp_path / "data.jsonl"), tokenizer, "", with_rows=True)
    for line, prompt in zip(LINES, prompts, strict=True):
        assert line.items() <= json.loads(prompt.row).items(), "values of the file stay as they are"
        assert json.loads(prompt.row)["gold_answer"] == line.get("gold_answer", "")
    assert [prompt.gold for prompt in prompts] == ["", "\\frac{1", "7"]
    with pytest.raises(ConfigError, match="line 1 has no value for 'gold_answer'"):
        problems.load_prompts(str(tmp_path / "data.jsonl"), tokenizer, "")
    (tmp_path / "data.jsonl").write_text(json.dumps(LINES[2]))
    assert not problems.load_prompts(str(tmp_path / "data.jsonl"), tokenizer, "")[0].row, "only where it is read"


def test_numbers_are_the_rewards_that_advantages_compare():
    prompt = Prompt(0, "q", "", None, (1,))
    values = {0.5: Outcome.CORRECT, 0.25: Outcome.CORRECT, -1.0: Outcome.INCORRECT, None: Outcome.INCORRECT}
    rollouts = [[Rollout(prompt, 0, index, (5,), "", True) for index in range(5)]]
    verdicts = [[Verdict(outcome, "function", reward=reward) for reward, outcome in values.items()]]
    verdicts[0].append(Verdict(Outcome.UNKNOWN, "function"))
    samples = selection.samples(rollouts, verdicts, c.SelectionConfig(keep="all"), (0, 0))
    rewards = [0.5, 0.25, -1.0, -1.0]
    assert [sample.reward for sample in samples] == rewards
    others = [(sum(rewards) - reward) / 3 for reward in rewards]
    assert [sample.advantage for sample in samples] == pytest.approx(
        [r - o for r, o in zip(rewards, others, strict=True)]
    )
    assert selection.summary(rollouts, verdicts, samples)["reward/mean"] == pytest.approx(sum(rewards) / 4)
    pair = selection.samples(rollouts, verdicts, c.SelectionConfig(keep="pair"), (0, 0))
    assert [sample.reward > 0 for sample in pair] == [True, False]

"""`oreal data`: what is dropped and why, whatever the order and wherever it was interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oreal_megatron.cli.main import main
from oreal_megatron.config import ConfigError
from oreal_megatron.data import demonstrations, filter_problems, overlap
from oreal_megatron.data.demonstrations import DemonstrationChoice
from oreal_megatron.data.filter_problems import ProblemFilter

LONG = "Find the sum of all integer bases b greater than nine for which it divides"


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problem(question: str, rate: float | None = 0.1, **more) -> dict:
    return {"question": question, "gold_answer": "3", "pass_rate": rate, "subject": "algebra", **more}


CASES = {  # a line -> why it is dropped
    "plain": (problem("What is 1+2?"), ""),
    "other operator": (problem("What is 1-2?"), ""),
    "same but for spaces": (problem("what is  $1+2$"), filter_problems.DUPLICATE),
    "in the test file": (problem("Test question?"), filter_problems.CONTAMINATED),
    "thirteen words of it": (problem(f"{LONG} by 7"), filter_problems.CONTAMINATED),
    "twelve": (problem(LONG.removeprefix("Find the sum ") + " by 7"), ""),
    "easy": (problem("Easy?", 0.5), filter_problems.EASY_OR_HARD),
    "at the limit": (problem("Limit?", 0.3), ""),
    "hard": (problem("Hard?", 0.0), filter_problems.EASY_OR_HARD),
    "unrated": (problem("Unrated?", None), filter_problems.UNRATED),
    "unreadable": (problem("Unreadable?") | {"gold_answer": "$$"}, filter_problems.UNREADABLE),
    "no gold": ({"question": "No gold?"}, filter_problems.NO_PROBLEM),
    "rate of no sense": (problem("Rate?", 7), filter_problems.NO_PROBLEM),
    "twice": (problem("Twice?"), ""),
    "and again": (problem("Twice?", 0.2), filter_problems.DUPLICATE),
}


@pytest.fixture
def inputs(tmp_path) -> tuple[str, str]:
    tests = [{"problem": "Test question", "answer": "4"}, {"problem": LONG + " one", "answer": "1"}]
    return write(tmp_path / "in.jsonl", [line for line, _ in CASES.values()]), write(tmp_path / "test.jsonl", tests)


def test_each_line_stays_unchanged_or_has_a_reason(inputs, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = [
        "data",
        "filter",
        inputs[0],
        str(out),
        "--min-rate",
        "0.05",
        "--max-rate",
        "0.3",
        "--against",
        inputs[1],
    ]
    assert main(arguments) == 0
    assert read(out) == [line for line, reason in CASES.values() if not reason]
    _, *decisions = read(tmp_path / "out.jsonl.decisions.jsonl")
    assert [line["dropped"] for line in decisions] == [reason for _, reason in CASES.values()]
    printed = capsys.readouterr().out
    assert "5 of 15 problems are in the output" in printed and "2 overlap with a test file" in printed
    assert main(arguments) == 0 and read(out) == read(tmp_path / "out.jsonl.1"), "the former output is set aside"
    assert main([*arguments, "--max-rate", "0.4"]) == 2
    assert "is of another input or other settings; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("checks_done", range(6))
def test_an_interrupted_filter_continues_after_the_last_whole_decision(checks_done, inputs, tmp_path):
    whole, out, settings = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", ProblemFilter(0.05, 0.3, (inputs[1],))
    checked: list[str] = []

    def readable(gold: str) -> bool:
        if len(checked) == checks_done and not resumed:
            raise KeyboardInterrupt
        checked.append(gold)
        return gold != "$$"

    resumed = True
    counts = filter_problems.filter_file(inputs[0], whole, settings, readable)
    checks, resumed = len(checked), False
    checked.clear()
    with pytest.raises(KeyboardInterrupt):
        filter_problems.filter_file(inputs[0], out, settings, readable)
    assert not out.exists(), "no part of the output has its name"
    with open(f"{out}.decisions.jsonl", "a") as file:
        file.write('{"line": 9, "dro')  # a crash in the middle of a line
    resumed = True
    assert filter_problems.filter_file(inputs[0], out, settings, readable) == counts
    assert out.read_text() == whole.read_text() and len(checked) == checks, "no gold answer was checked twice"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-rate", "1.5"], "expected 0 <= low <= high <= 1"),
        (["--min-rate", "0.5", "--max-rate", "0.4"], "expected 0 <= low <= high <= 1"),
        (["--against", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--key", "question"], "an equals sign and a key"),
        (["--key", "prompt=question"], "expected one of question, gold_answer"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(arguments, says, inputs, tmp_path, capsys):
    assert main(["data", "filter", inputs[0], str(tmp_path / "out.jsonl"), *arguments]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("line", "arguments", "says"),
    [
        ({"prompt": "1+1?", "gold_answer": "2"}, [], "line 1 has no value for 'question'; its keys are prompt, gold_a"),
        ({"prompt": "1+1?", "gold_answer": "2"}, [], "Name the right one with --key question=prompt"),
        ({"question": "1+1?"}, ["--key", "gold_answer=a"], "has no value for 'gold_answer'; its keys are question"),
        (
            problem("1+1?", None),
            ["--max-rate", "0.3"],
            "(1 no pass rate, 1 duplicate question); rate them with `oreal evaluate RECIPE --rate",
        ),
        (
            problem("1+1?", 0.9),
            ["--max-rate", "0.3"],
            "(1 pass rate outside the limits, 1 duplicate question); widen --min",
        ),
        (problem("1+1?") | {"gold_answer": "$$"}, [], "(1 unreadable gold answer, 1 duplicate question); give another"),
    ],
)
def test_a_filter_that_drops_every_line_is_bad_input_and_can_be_started_again(line, arguments, says, tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", [line, line]), tmp_path / "out.jsonl"
    for _ in range(2):  # other settings than those of the first start are not refused
        assert main(["data", "filter", source, str(out), *arguments]) == 2
        said = capsys.readouterr().err
        assert says in said and "none of the 2 lines" in said and not list(tmp_path.glob("out*"))
        arguments = [*arguments, "--key", "pass_rate=pass_rate"]


def test_the_input_is_never_the_output(inputs, capsys):
    assert main(["data", "filter", inputs[0], inputs[0]]) == 2
    assert "is the input itself" in capsys.readouterr().err


def test_keys_of_other_trainers(tmp_path):
    line = {"prompt": [{"role": "user", "content": "What is 1+2?"}], "reward_model": {"ground_truth": 3}}
    source, out = write(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    keys = ["--key", "question=prompt", "--key", "gold_answer=reward_model.ground_truth"]
    assert main(["data", "filter", source, str(out), *keys]) == 0 and read(out) == [line]


@given(st.text(alphabet="ab +-$.", max_size=12), st.text(alphabet="ab +-$.", max_size=12))
def test_overlap_of_short_texts_is_equality_without_spaces_and_punctuation(first, second):
    equal = first.translate(str.maketrans("", "", " $.")) == second.translate(str.maketrans("", "", " $."))
    assert overlap.TextIndex([first]).overlaps(second) == equal


def rollout(question: str, response: str, verdict: str = "correct", **more) -> dict:
    return {"question": question, "response": response, "verdict": verdict, "finished": True, **more}


ROLLOUTS = [
    *[rollout("p", "x" * length, tokens=length) for length in (9, 3, 5, 3, 7)],
    rollout("p", "wrong", "incorrect"),
    rollout("p", "?", "unknown"),
    rollout("p", "xx", tokens=2) | {"finished": False},
    rollout("p", "x", tokens=1, penalty="repetition"),
    rollout("q", "only"),
    rollout("r", "wrong", "incorrect"),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.permutations(ROLLOUTS), st.integers(1, 3), st.sampled_from(["shortest", "random"]), st.integers(0, 3))
def test_the_choice_is_correct_balanced_and_independent_of_the_order(tmp_path, lines, per_problem, order, seed):
    results = []
    for number, variant in enumerate((lines, ROLLOUTS)):
        out, choice = tmp_path / f"out{number}.jsonl", DemonstrationChoice(order, per_problem, seed)
        counts, covered, uncovered = demonstrations.write_demonstrations(
            [write(tmp_path / "in.jsonl", variant)], out, choice
        )
        results.append(sorted((line["question"], line["response"]) for line in read(out)))
        assert (covered, uncovered, sum(counts.values())) == (2, 1, len(ROLLOUTS))
        assert counts[""] == len(results[-1]) == per_problem + 1
        out.unlink()
    assert results[0] == results[1]
    chosen = sorted(len(response) for question, response in results[0] if question == "p")
    assert order == "random" or chosen == [3, 5, 7][:per_problem]
    assert set(chosen) <= {3, 5, 7, 9} and ("q", "only") in results[0]


def test_random_choices_differ_with_the_seed_and_demonstrations_are_read_by_sft(tmp_path):
    lines = [rollout(f"p{number}", text) for number in range(20) for text in ("a", "bb", "ccc")]
    random.Random(0).shuffle(lines)
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    texts = set()
    for seed in ("0", "1"):
        assert main(["data", "rft", source, str(out), "--choose", "random", "--seed", seed]) == 0
        texts.add(out.read_text())
    assert len(texts) == 2 and all(set(line) == {"question", "response"} for line in read(out))


def test_a_run_folder_is_an_input_and_nothing_correct_is_refused(tmp_path, capsys):
    (tmp_path / "run/rollouts").mkdir(parents=True)
    write(tmp_path / "run/rollouts/step_000000.jsonl", ROLLOUTS[:1])
    write(tmp_path / "run/rollouts/step_000001.jsonl", ROLLOUTS[9:])
    assert main(["data", "rft", str(tmp_path / "run"), str(tmp_path / "out.jsonl")]) == 0
    assert len(read(tmp_path / "out.jsonl")) == 2
    wrong = write(tmp_path / "wrong.jsonl", ROLLOUTS[5:6])
    with pytest.raises(
        ConfigError, match=r"none of the 1 rollouts is a demonstration \(1 \w[^{}]+\); expected .*: sample"
    ):
        demonstrations.write_demonstrations([wrong], tmp_path / "none.jsonl", DemonstrationChoice())
    foreign = write(tmp_path / "foreign.jsonl", [{"question": "p"}])
    assert main(["data", "rft", foreign, str(tmp_path / "none.jsonl")]) == 2
    assert "is not a rollout with a verdict" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()

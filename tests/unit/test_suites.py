"""Scores of several answers, benchmarks by name, what training has seen, and an evaluation that was interrupted."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from oreal_megatron.cli.main import main
from oreal_megatron.config import (
    Config,
    ConfigError,
    EngineConfig,
    JudgeConfig,
    ModelConfig,
    SamplingConfig,
    VerifyConfig,
)
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.data import overlap, problems
from oreal_megatron.evaluation import benchmark, model_settings, results, statistics, suites
from oreal_megatron.evaluation.score import summarize
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict
from oreal_megatron.session.inputs import read_inputs

SHARED = Path(__file__).parents[3] / "shared/data"


@pytest.mark.parametrize(("answers", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 1, 7), (8, 6, 4)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(answers, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (answers - right), k))
    assert statistics.pass_at_k(answers, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_more_answers_than_were_asked_for_cannot_be_estimated():
    with pytest.raises(ValueError, match="pass@4 cannot be estimated from 2 responses"):
        statistics.pass_at_k(2, 1, 4)


@pytest.mark.parametrize(
    ("extracted", "right", "expected"),
    [
        (["1", "2", "2"], [True, False, False], False),
        (["1", "1", "2"], [True, True, False], True),
        (["1 ", " 1", "2", "2", "1"], [True, True, False, False, True], True),
        ([None, None, "3"], [False, False, True], True),  # no answer is no vote
        (["1", "2"], [True, False], True),  # a tie goes to the first
        (["2", "1"], [False, True], False),
        ([None], [False], False),
    ],
)
def test_the_majority_decides(extracted, right, expected):
    assert statistics.majority_is_correct(extracted, right) is expected


def test_the_bootstrap_interval_is_that_of_the_mean():
    scores = [1.0] * 60 + [0.0] * 40
    low, high = statistics.bootstrap(scores, seed=0)
    spread = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (low, high) == (pytest.approx(0.6 - spread, abs=0.02), pytest.approx(0.6 + spread, abs=0.02))
    assert statistics.bootstrap(scores, seed=0) == (low, high) and statistics.bootstrap([1.0] * 9, 0) == (1.0, 1.0)


def test_a_summary_counts_unknown_and_truncated_answers_as_not_right():
    def row(problem, verdict, extracted="1", finished=True):
        return {"problem": problem, "verdict": verdict, "extracted": extracted, "tokens": 10 * (problem + 1),
                "finished": finished, "method": "exact"}  # fmt: skip

    rows = [row(0, "correct"), row(0, "correct"), row(0, "incorrect", "2"), row(0, "unknown", None, False)]
    rows += [row(1, "incorrect"), row(1, "incorrect"), row(1, "correct", "2"), row(1, "incorrect", None)]
    scores = summarize(rows, seed=0)
    assert scores["accuracy"] == 3 / 8 and scores["unknown"] == 1 and scores["truncated"] == 1 / 8
    assert scores["pass_at"] == {"1": pytest.approx(3 / 8), "2": pytest.approx((5 / 6 + 1 / 2) / 2), "4": 1.0}
    assert scores["majority"] == 0.5 and scores["tokens"] == {"mean": 15.0, "median": 10.0, "most": 20.0}
    none = summarize([row(number, "incorrect") for number in range(10)], seed=0)
    assert none["accuracy"] == 0 and none["interval"] == pytest.approx([0.0, 0.2775], abs=1e-4)


def test_suites_have_names_paths_or_a_place_on_the_hub(tmp_path):
    lines = [{"problem": "a", "answer": "1", "part": "I"}, {"problem": "b", "answer": "2", "part": "II"}]
    (tmp_path / "aime2025.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite, path = suites.find("aime25-1", tmp_path)
    assert suites.problem_numbers(suite, path) == {0} and suites.problem_numbers(*suites.find("aime25", tmp_path)) == {
        0,
        1,
    }
    assert suites.problem_numbers(*suites.find(path, Path("elsewhere"))) == {0, 1}
    for name, says in (
        ("aime26", "choose one of math500"),
        ("gsm8k", "does not exist"),
        ("hub:x", "expected hub:OWNER"),
    ):
        with pytest.raises(ConfigError, match=says):
            suites.find(name, tmp_path)


def test_a_suite_that_is_not_there_comes_from_the_hub(tmp_path, monkeypatch):
    fetched = tmp_path / "fetched.jsonl"
    fetched.write_text('{"problem": "a", "answer": 70}\n{"question": "b", "answer": "2"}\n')
    asked = []
    monkeypatch.setattr(suites.lines, "_download", lambda name: asked.append(name) or fetched)
    found = {name: suites.find(name, tmp_path) for name in ("math500", "aime25-1", "aime25")}
    assert asked == [suites.SUITES[name].hub for name in found]
    assert all(suites.problem_numbers(*suite) == {0, 1} for suite in found.values()), (
        "the file on the hub is the part alone"
    )
    assert [line["gold_answer"] for line in problems.read_problems(str(fetched))] == ["70", "2"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_the_real_benchmarks_have_as_many_problems_as_the_paper():
    sizes = {"math500": 500, "aime24": 30, "aime25-1": 15, "gsm8k": 1319, "olympiad": 675, "amc23": 40}
    assert {name: len(suites.problem_numbers(*suites.find(name, SHARED))) for name in sizes} == sizes


def test_a_problem_is_seen_with_its_words_or_thirteen_of_them_in_a_row():
    long = "Find the sum of all integer bases b greater than nine for which it divides"
    training = ["What is 2 + 2?", "Show first. " + long.upper() + ", please."]
    problems = ["what is $2+2$", "What is 2 + 3?", f"{long} seventeen.", "Find the sum of all integer bases b"]
    assert overlap.find_overlap(problems, training) == [0, 2]


def by_hand(k: int, correct: list[int]) -> float:
    """pass@k of k responses a problem: the share of problems with a correct one."""
    return sum(count > 0 for count in correct) / len(correct)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 12, 100, 128, 129, 200])
def test_the_row_of_pass_at_k_holds_that_of_k_itself(k):
    correct = [0, 0, 1, min(2, k)]
    rows = [
        {"problem": number, "verdict": "correct" if i < count else "incorrect", "extracted": str(i), "tokens": 1,
         "finished": True, "method": "exact"}
        for number, count in enumerate(correct) for i in range(k)
    ]  # fmt: skip
    scores = summarize(rows, seed=0)
    assert scores["pass_at"][str(k)] == pytest.approx(by_hand(k, correct)) and max(map(int, scores["pass_at"])) == k
    text = results.markdown_table("x", {"mine": "Mine"}, {"mine": {"sampled": scores}})
    assert f"| **x**, pass@{k} | 50.0 |" in text
    del scores["pass_at"][str(k)]  # as 0.1.0 wrote it for most k
    assert f"| **x**, pass@{k} | – |" in results.markdown_table("x", {"mine": "Mine"}, {"mine": {"sampled": scores}})


def test_problems_that_cannot_be_answered_or_graded_are_skipped_named_and_counted(model_folder, tmp_path, caplog):
    file = tmp_path / "mine.jsonl"
    rows = [("1+1=", "2"), ("1+2=", "?"), ("1+" * 20, "1"), ("1+3=", "4"), ("1+" * 21, "?")]
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    config = Config(model=ModelConfig(str(model_folder)), engine=EngineConfig(max_model_len=48))
    inputs = read_inputs(config)
    suite = benchmark.suite_prompts(inputs, suites.named(str(file)), str(file))
    usable = benchmark.usable_prompts(inputs, "mine", suite)
    assert [prompt.id for prompt in usable] == [0, 3]
    assert "boxed answer after more than 38 tokens, problem 3, 5" in caplog.text
    assert "cannot equate with themselves, problem 2, 5: 3 of 5 problems are skipped" in caplog.text
    assert [prompt.id for prompt in benchmark.first_problems(usable, suite, 3)] == [0]
    with pytest.raises(ConfigError, match="none of the first 1 problems"):
        benchmark.first_problems(usable[1:], suite, 1)
    with pytest.raises(ConfigError, match="suite mine: .*problem 2"):
        benchmark.usable_prompts(inputs, "mine", suite[1:2])
    score = {"problems": 2, "skipped": 3, "answers_per_problem": 1, "accuracy": 0.5, "pass_at": {"1": 0.5}}
    assert (
        "mine: 3 problems were skipped and are in no score"
        in results._overlap_notes({"mine": {"greedy": score}}, {})[0]
    )


@pytest.mark.parametrize("made", [None, "empty", "run"])
def test_a_missing_model_is_named_before_a_suite_is_downloaded(made, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    if made:
        model.mkdir()
    if made == "run":
        (model / "config.json").write_text("{}")
        (model / "policy").mkdir()
        (model / "policy/config.json").write_text("{}")
    monkeypatch.setattr(suites.lines, "_download", lambda name: pytest.fail(f"{name} is downloaded first"))
    assert main(["evaluate", str(model), "--suite", "math500", "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{model} is not a" in message and (made != "run" or f"a model in it is {model}/policy" in message)


@pytest.mark.parametrize("words", [("--problems", "-1"), ("--samples", "0"), ("--samples", "-2"), ("--problems", "x")])
def test_negative_counts_are_refused(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", "model", *words])
    assert leaving.value.code == 2 and f"argument {words[0]}: expected a whole number" in capsys.readouterr().err


def test_the_table_stands_beside_the_papers():
    score = {"answers_per_problem": 1, "accuracy": 0.5, "interval": [0.4, 0.6], "pass_at": {"1": 0.5}, "majority": 0.5}
    more = score | {"answers_per_problem": 4, "accuracy": 0.25, "pass_at": {"1": 0.25, "4": 0.75}}
    text = results.markdown_table("x", {"math500": "MATH-500", "mine": "Mine"}, {
        name: {"greedy": score, "sampled": more} for name in ("math500", "mine")
    })  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["model", "MATH-500", "Mine"] and rows[2][1:] == ["50.0 (40.0 to 60.0)"] * 2
    assert rows[3][0].endswith("avg@4") and rows[4][1] == "75.0" and ["OREAL-7B (paper)", "91.0", "–"] in rows
    assert "(paper)" not in results.markdown_table("x", {"mine": "Mine"}, {"mine": {"greedy": score}})


def test_answers_of_other_settings_are_not_mixed(tmp_path, model_folder):
    inputs = SimpleNamespace(config=Config(), folder=HFFolder(model_folder))
    results.check_settings(tmp_path, inputs, {"greedy": SamplingConfig(temperature=0.0)}, {})
    results.check_settings(
        tmp_path, inputs, {"greedy": SamplingConfig(temperature=0.0), "sampled": SamplingConfig()}, {}
    )
    with pytest.raises(ConfigError, match="holds responses with another sampled; choose another folder with --out"):
        results.check_settings(tmp_path, inputs, {"sampled": SamplingConfig(temperature=0.5)}, {})
    for config, says in (
        (Config(seed=3), "seed"),
        (Config(verify=VerifyConfig(thinking_end=("</s>",))), "thinking_end"),
        (Config(verify=VerifyConfig(judge=JudgeConfig(urls=("http://x",)))), "judge"),
        (Config(verify=VerifyConfig(function=f"{__file__}:any_function")), "verify.function"),
    ):
        with pytest.raises(ConfigError, match=f"another {says}"):
            results.check_settings(tmp_path, SimpleNamespace(config=config, folder=inputs.folder), {}, {})


def test_answers_to_other_problems_of_the_same_name_are_not_taken_for_these(tmp_path, model_folder):
    inputs = SimpleNamespace(config=Config(), folder=HFFolder(model_folder))

    def claim(path, *problems):
        results.check_settings(
            tmp_path, inputs, {}, {path: [Prompt(n, *both, None, (1,)) for n, both in enumerate(problems)]}
        )

    claim("a/test.jsonl", ("q", "1"), ("r", "2"))
    claim("a/test.jsonl", ("q", "1"), ("r", "2"))
    claim("a/other.jsonl", ("s", "1"))
    for path, edited in (("b/test.jsonl", ("s", "1")), ("a/test.jsonl", ("q", "3")), ("a/test.jsonl", ("q2", "1"))):
        with pytest.raises(ConfigError, match="another suite test; choose another folder with --out"):
            claim(path, edited, ("r", "2"))


def test_results_of_several_calls_into_one_folder_are_kept(tmp_path, capsys):
    score = {"problems": 4, "answers_per_problem": 1, "accuracy": 0.5, "interval": [0.4, 0.6], "pass_at": {"1": 0.5},
             "majority": 0.5}  # fmt: skip
    results.write_results(tmp_path, "x", {"math500": {"greedy": score, "sampled": score}}, {"math500": [1, 2]})
    results.write_results(tmp_path, "x", {"mine.jsonl": {"greedy": score}}, None)
    results.write_results(tmp_path, "x", {"math500": {"greedy": score | {"accuracy": 0.75}}}, {"math500": [3]})
    written, table = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "table.md").read_text()
    assert written["suites"]["mine.jsonl"]["greedy"] == score == written["suites"]["math500"]["sampled"]
    assert written["suites"]["math500"]["greedy"]["accuracy"] == 0.75 and written["seen_in_training"] == {
        "math500": [3]
    }
    assert "| 75.0 (40.0 to 60.0) | 50.0 (40.0 to 60.0) |" in table and "avg@1 | 50.0 (40.0 to 60.0) | – |" in table
    assert "math500: 1 of 4 problems occur in the training prompts" in table and "mine.jsonl: not checked" in table


class SessionWithoutEngine:
    """Session in which the checks of the input take place, and no engine starts."""

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def lock(self, folder): ...

    def start_engine(self, inputs):
        pytest.fail("the engine starts first")


@pytest.mark.parametrize("training", ["nowhere.jsonl", "no_question.jsonl", "."])
def test_training_prompts_that_cannot_be_read_are_refused_before_the_engine(
    training, tmp_path, model_folder, monkeypatch, capsys
):
    (tmp_path / "suite.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    (tmp_path / "no_question.jsonl").write_text('{"text": "1+1="}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "Session", SessionWithoutEngine)
    words = ["--suite", "suite.jsonl", "--out", "out", "--training", training]
    assert main(["evaluate", str(model_folder), *words]) == 2
    assert f"data file {training}" in (text := capsys.readouterr().err) or f"{training} line 1" in text


def test_problems_that_a_function_grades_need_no_gold_answer(tmp_path, model_folder):
    """A function may take what it needs from the row, as in training."""
    path = tmp_path / "suite.jsonl"
    path.write_text('{"question": "1+1=", "tests": ["f() == 2"]}\n{"question": "1+2=", "answer": ["3"]}\n')
    verify = VerifyConfig(function=f"{__file__}:any_function")
    config = Config(model=ModelConfig(str(model_folder)), engine=EngineConfig(max_model_len=64), verify=verify)
    inputs = read_inputs(config)
    suite = benchmark.suite_prompts(inputs, suites.named(str(path)), str(path))
    assert [prompt.id for prompt in benchmark.usable_prompts(inputs, "suite", suite)] == [0, 1]


def any_function(row, response):
    return True


@pytest.mark.parametrize("text", ["", "[1]"])
def test_broken_files_are_told_in_a_sentence(text, tmp_path, model_folder, capsys):
    run, recipe = tmp_path / "run", tmp_path / "recipe.py"
    (run / "policy").mkdir(parents=True)
    recipe.write_text(
        f"from oreal_megatron.config import *\ndef lone(): return Config(model=ModelConfig({str(run)!r}))\n"
    )
    (run / "config.json").write_text(text)
    told = []
    for words in (["evaluate", str(run)], ["evaluate", str(run / "policy")], ["plan", f"{recipe}:lone", "--gpus", "1"]):
        assert main([*words, *["--suite", "math500"] * (words[0] == "evaluate")]) == 2
        told.append(capsys.readouterr().err)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        results.check_settings(tmp_path, SimpleNamespace(config=Config(), folder=HFFolder(model_folder)), {}, {})
    for sentence in (*told, str(refused.value)):
        assert "cannot be read as JSON" in sentence or "holds list; expected a JSON object" in sentence


class Engine:
    """Answers with numbers that follow from seed and place; breaks down before a chosen block."""

    def __init__(self, breaks_at: int = -1):
        self.calls, self.breaks_at = [], breaks_at

    def generate(self, prompts, sampling, seed, finished):
        if len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.calls.append(seed)
        rows = [
            [Rollout(p, slot, k, (1,) * (k + 1), str((seed[1] * 31 + slot * 7 + k) % 3), True)
             for k in range(sampling.rollouts_per_prompt)] for slot, p in enumerate(prompts)
        ]  # fmt: skip
        for row in rows:
            for rollout in row:
                finished(rollout)
        return rows


class Verifier:
    def submit(self, rollout):
        pass

    def verdicts(self, rollouts):
        outcome = {True: Outcome.CORRECT, False: Outcome.INCORRECT}
        return [[Verdict(outcome[r.text == "1"], "exact", r.text) for r in row] for row in rollouts]


def test_an_interrupted_evaluation_goes_on_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BLOCK", 4)
    asked = [Prompt(number, f"q{number}", "1", None, (1,)) for number in range(10)]
    arguments = ("s.jsonl", asked, "sampled", SamplingConfig(rollouts_per_prompt=2), Config())
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = benchmark.answer_suite(*arguments, tmp_path / "whole", Engine(), Verifier())
    with pytest.raises(KeyboardInterrupt):
        benchmark.answer_suite(*arguments, tmp_path / "parts", Engine(breaks_at=2), Verifier())
    file = tmp_path / "parts/s.sampled.jsonl"
    file.write_text(file.read_text()[:-30])  # the last line was cut off as well, so its block is asked again
    again = Engine()
    assert benchmark.answer_suite(*arguments, tmp_path / "parts", again, Verifier()) == whole
    assert again.calls == [(0, -5), (0, -9)] and len(whole) == 20
    third = Engine()
    assert benchmark.answer_suite(*arguments, tmp_path / "parts", third, Verifier()) == whole and not third.calls


def test_an_interrupted_rating_goes_on_under_the_layout_of_the_engine(tmp_path, monkeypatch, model_folder):
    data, recipe, rated = tmp_path / "data.jsonl", tmp_path / "recipe.py", tmp_path / "rated.jsonl"
    lines = [{"question": f"q{number}", "gold_answer": "1", "source": "s"} for number in range(10)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe.write_text(
        "from oreal_megatron.config import *\n"
        f"def lone(): return Config(model=ModelConfig({str(model_folder)!r}), data=DataConfig({str(data)!r}),\n"
        "    parallel=ParallelConfig(tensor=8, pipeline=2), engine=EngineConfig(max_model_len=64),\n"
        "    sampling=SamplingConfig(max_new_tokens=48))\n"
    )
    engines = [Engine(breaks_at=1), Engine(), Engine()]
    started = iter(engines)

    class FakeSession:
        def __init__(self, config):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def lock(self, folder):
            folder.mkdir(exist_ok=True)

        def start_engine(self, inputs):
            return next(started), Verifier()

    monkeypatch.setattr(benchmark, "BLOCK", 4)
    monkeypatch.setattr(benchmark, "Session", FakeSession)
    words = ["evaluate", f"{recipe}:lone", "--samples", "4", "--rate", str(rated)]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert main(words) == 0 and [len(engine.calls) for engine in engines] == [1, 2, 0]
    first = [json.loads(line) for line in rated.read_text().splitlines()]
    assert [line | {"pass_rate": None} for line in first] == [line | {"pass_rate": None} for line in lines]
    assert {line["pass_rate"] for line in first} <= {0.25, 0.5} and len(first) == 10
    data.write_text(data.read_text().replace("q3", "q33"))
    assert main(words) == 2, "other prompts are not given these rates"


@pytest.mark.parametrize("function", ["", ":job"])
def test_a_recipe_is_evaluated_with_and_without_its_name(function, tmp_path):
    (tmp_path / "recipe.py").write_text("from oreal_megatron.config import *\ndef job():\n    return Config(seed=5)\n")
    assert model_settings.config_for(f"{tmp_path}/recipe.py{function}", []).seed == 5


def test_the_cache_of_a_lone_folder_fills_the_gpu(model_folder, tmp_path, monkeypatch, capsys):
    assert model_settings.with_kv_cache(model_settings.config_for(str(model_folder), [])).engine.kv_cache_gib == 1.0, (
        "on a CPU"
    )
    monkeypatch.setattr(model_settings.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model_settings.torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    named = model_settings.config_for(str(model_folder), ["engine.kv_cache_gib=3"])
    assert model_settings.with_kv_cache(named).engine.kv_cache_gib == 3
    file = SimpleNamespace(stat=lambda: SimpleNamespace(st_size=62 * 2**30))
    monkeypatch.setattr(model_settings, "HFFolder", lambda path: SimpleNamespace(weight_files=[file]))
    alone = model_settings.config_for(str(model_folder), [])
    with pytest.raises(ConfigError, match="needs 62.0 GiB of each GPU; 70.0 GiB are free"):
        model_settings.with_kv_cache(alone)
    halved = model_settings.with_kv_cache(model_settings.config_for(str(model_folder), ["engine.tensor=2"]))
    assert halved.engine.kv_cache_gib == 70 - 31 - model_settings.MARGIN_GIB
    assert "engine.kv_cache_gib=29.0: 70.0 GiB free" in capsys.readouterr().out

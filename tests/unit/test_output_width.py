"""Results of `oreal evaluate`, `oreal replay` and `oreal plan --rehearse` fit a terminal of 80 columns."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from repository import ROOT
from rich.console import Console

from oreal_megatron import settings
from oreal_megatron.evaluation import results, suites
from oreal_megatron.models import architecture
from oreal_megatron.observe import metric_table
from oreal_megatron.observe.metric_comparison import MetricPair, print_comparison
from oreal_megatron.plan import gpus, published, rehearsal
from oreal_megatron.plan.scenario import Scenario

LONG_PATH = "/data/checkpoints/" + "a_long_name/" * 8
METRICS = [
    re.sub("[A-Z]+", "reward_model", name)
    for table in vars(metric_table).values()
    if isinstance(table, tuple)
    for row in table
    if isinstance(row, metric_table.MetricInfo)
    for name in row.names
]


@pytest.fixture(autouse=True)
def terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def assert_narrow(printed: str) -> None:
    """Lines are of 80 columns at most, but for one that ends with a path."""
    long = [line for line in printed.splitlines() if len(line) > 80]
    assert [line for line in long if not line.endswith(LONG_PATH)] == []


def test_scores_and_notes_of_all_suites(tmp_path, capsys, monkeypatch):
    score = dict(
        problems=100_000, skipped=12_345, answers_per_problem=16, accuracy=1.0, interval=[0.999, 1.0],
        pass_at={"16": 1.0}, majority=1.0, tokens={"mean": 32_768.0}, truncated=1.0, methods={}, unknown=100_000,
    )  # fmt: skip
    both = {"greedy": score | {"answers_per_problem": 1}, "sampled": score}
    monkeypatch.setattr(results.files, "write_text", lambda file, text: None)
    names = [*suites.SUITES, f"{LONG_PATH}problems.jsonl"]
    results.write_results(tmp_path, LONG_PATH, dict.fromkeys(names, both), {name: [1] for name in names[:3]})
    printed = capsys.readouterr().out.replace(str(tmp_path), LONG_PATH)
    assert "12345 problems were skipped" in " ".join(printed.split()) and "100.0" in printed
    assert_narrow(printed)


@pytest.mark.parametrize("difference", [0.0, 0.000123456])
def test_a_comparison_of_all_metrics(difference, capsys):
    assert len(METRICS) > 70 and max(map(len, METRICS)) > 30
    pairs = [MetricPair(name, -1.23456789e-10, -1.23456789e-10, difference, False) for name in METRICS]
    longest = MetricPair(max(METRICS, key=len), 1e-300, 1.0, 2 * difference, False)
    print_comparison([*pairs, longest], f"step 123456, from {LONG_PATH}, steps {', '.join(map(str, range(30)))}")
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert ("dumps of some steps since the checkpoint are missing" in words) == bool(difference)
    assert ("reproduced bit for bit" in words) != bool(difference)
    assert_narrow(printed)


def test_a_rehearsal_with_faults(capsys):
    config = settings.from_recipe(f"{ROOT}/examples/recipes/oreal.py:oreal_32b")
    scenario = Scenario(config, architecture.read(published.read_config(config.model.path)[0]),
                        gpus.find_gpu("h100-80g"), config.gpus)  # fmt: skip
    bytes_of = {name: dict.fromkeys(rehearsal.PARTS, 123 * 2**30) for name in scenario.roles}
    rank = SimpleNamespace(
        rank=127,
        bytes=bytes_of,
        tokens=[4096] * 4,
        mini_batches=[4],
        activation_bytes=dict.fromkeys(bytes_of, 123 * 2**30),
    )
    faults = {"collectives: the same order and sizes in every group, of 1234567 calls": [LONG_PATH * 2] * 7}
    done = rehearsal.Rehearsal([rank] * 40, [], [])
    rehearsal._print_results(scenario, done, faults, 12_345.0, Console())
    printed = capsys.readouterr().out
    assert "FAULT" in printed and "and 2 more" in printed and "123.00" in printed
    assert_narrow(printed)

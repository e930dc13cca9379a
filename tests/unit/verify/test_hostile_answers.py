"""The grader on the hostile answers of ../shared/data, where it is present."""

import random
import time
from pathlib import Path

from oreal_megatron import config
from oreal_megatron.records import Outcome
from oreal_megatron.verify.grader import Grader


def test_hostile_answers(shared_rows, tmp_path, monkeypatch):
    rows = shared_rows("evil_answers.jsonl")
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with Grader(config.VerifyConfig(workers=2)) as grader:
        boxed = [grader.submit(row["gold"], f"\\boxed{{{row['answer']}}}") for row in rows]
        bare = [grader.submit_text(row["gold"], row["answer"]) for row in rows]
        for row, *verdicts in zip(
            rows, *([f.result(timeout=60) for f in futures] for futures in (boxed, bare)), strict=True
        ):
            for verdict in verdicts:
                assert verdict.seconds <= 2.5, row["id"]
                assert verdict.outcome is not Outcome.CORRECT or row["expect"].startswith("either"), row["id"]
        pids = grader.worker_pids()
        assert pids and all(peak_mb(pid) < 300 for pid in pids)
        assert all(Path(f"/proc/{pid}/task/{pid}/children").read_text() == "" for pid in pids)
    assert time.monotonic() - start < 60 and list(tmp_path.iterdir()) == []


def peak_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def test_a_step_of_1024_rollouts_with_hostile_ones(shared_rows):
    chance = random.Random(0)
    golds = [row["answer"] for row in shared_rows("math500.jsonl")]
    hostile = shared_rows("evil_answers.jsonl")
    step = [(gold, gold) for gold in chance.choices(golds, k=973)]
    step += [(row["gold"], row["answer"]) for row in chance.choices(hostile, k=51)]
    chance.shuffle(step)
    with Grader(config.VerifyConfig(workers=2)) as grader:
        start = time.monotonic()
        futures = [grader.submit(gold, f"{'some reasoning ' * 200} \\boxed{{{answer}}}") for gold, answer in step]
        outcomes = [future.result(timeout=60).outcome for future in futures]
        assert time.monotonic() - start < 15
    assert Outcome.UNKNOWN not in outcomes and outcomes.count(Outcome.CORRECT) >= 973

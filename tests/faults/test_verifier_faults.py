"""What goes wrong while one rank grades, all ranks hear alike: UNKNOWN items, or a stop with the same sentence."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from pathlib import Path

SCRIPT = [sys.executable, str(Path(__file__).parent.parent / "helpers/scripted_worker.py")]


class FailingGrader:
    """Its verdicts fail with an error that nobody foresaw."""

    def submit(self, *_) -> Future:
        future: Future = Future()
        future.set_exception(KeyError("a bug"))
        return future


def verdicts_of_a_step(free_port: int) -> dict:
    """Five answers, graded where they came from (odd ones on rank 1), with faults on rank 1 alone."""
    import torch.distributed as dist

    from oreal_megatron import config as c
    from oreal_megatron.records import Prompt, Rollout
    from oreal_megatron.runtime import distributed
    from oreal_megatron.verify.grader import Grader
    from oreal_megatron.verify.step_verifier import StepVerifier
    from oreal_megatron.verify.worker_pool import Pool

    dist.init_process_group("gloo")
    mine = distributed.rank()
    texts = ["\\boxed{1}", "kill", "\\boxed{2}", "sleep 30", "\\boxed{3}"]

    def outcome(grader, texts: list[str] = texts) -> object:
        rows = [[Rollout(Prompt(i, "", "x+1", None, (1,)), i, 0, (5,), text, True)] for i, text in enumerate(texts)]
        verifier = StepVerifier(grader, unknown_limit=0.5)
        for slot, (rollout,) in enumerate(rows):
            if slot % 2 == mine:
                verifier.submit(rollout)
        try:
            return [(row[0].outcome.value, row[0].method) for row in verifier.verdicts(rows)]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    down = c.JudgeConfig(urls=(f"http://127.0.0.1:{free_port}",), all_down_wait_s=0.3, retries=0, connect_timeout_s=0.2)
    scripted = shows_all(c.VerifyConfig(), Pool(1, 2.0, command=SCRIPT))
    broken = shows_all(c.VerifyConfig(), Pool(1, command=[*SCRIPT, "stillborn"])) if mine else scripted
    judged = Grader(c.VerifyConfig(judge=down)) if mine else scripted
    found = {
        "a killed worker and a late one": outcome(scripted),
        "no worker can be started": outcome(broken),
        "all judges are down": outcome(judged, ["\\boxed{1}"] * 5),
        "a bug": outcome(FailingGrader() if mine else scripted),
    }
    for grader in {scripted, broken, judged}:
        grader.close()
    dist.destroy_process_group()
    return found


def shows_all(verify, pool):
    """A grader that shows every text to its worker, whether or not it holds a box."""
    from oreal_megatron.verify.grader import Grader

    class Shown(Grader):
        def submit(self, gold, text, finished, question, row):
            return self.submit_text(gold, text, question)

    return Shown(verify, pool)


def test_ranks_never_disagree_about_what_went_wrong_on_one(in_processes):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = in_processes(2, verdicts_of_a_step, port)
    assert first == second
    assert first["a killed worker and a late one"] == [
        ("incorrect", "exact"),
        ("unknown", "error"),
        ("incorrect", "exact"),
        ("unknown", "time-out"),
        ("incorrect", "exact"),
    ]
    assert first["no worker can be started"].startswith("RunStopped: 5 grading processes in a row died")
    assert first["all judges are down"].startswith("RunStopped: no judge host replied for")
    assert first["a bug"].startswith("RunStopped: grading rollout (1, 0) failed with KeyError('a bug') on rank 1")

"""The verifier's front: responses in, Verdicts out.

Rules decide in worker processes; the judge, where there is one, sees the answers that they call incorrect.
"""

from __future__ import annotations

from concurrent.futures import Future

from oreal_megatron import config
from oreal_megatron.config import validate
from oreal_megatron.math_equality import extract, rules
from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.runtime.futures import copy_failure, fail, settle
from oreal_megatron.verify.judge import JudgeClient, Judgement
from oreal_megatron.verify.worker_pool import Pool, Result

_EASY_RESPONSE = 200_000  # characters of a response up to which this process itself searches for a box


class Grader:
    """Grades responses from any thread. The worker processes start with the first answer that needs one.

    Raises ConfigError for settings out of their bounds, wherever they come from.
    """

    def __init__(self, config: config.VerifyConfig, pool: Pool | None = None, judge: JudgeClient | None = None) -> None:
        validate(config, "verify.")
        self.config = config
        self._pool = pool or Pool(config.workers, config.timeout_s, config.memory_mib, function=config.function)
        self._judge = judge or (JudgeClient(config.judge) if config.judge.urls else None)

    def submit(
        self, gold: str, response: str, finished: bool = True, question: str = "", row: str = ""
    ) -> Future[Verdict]:
        """Return the future verdict of a response; never blocks. `row`: JSON for `verify.function`, if there is one.

        The future fails with ServersDown when no judge host replies for `judge.all_down_wait_s`, and with PoolBroken
        when no worker process can be started.
        """
        future: Future[Verdict] = Future()
        easy = self._easy(gold, response, finished)
        if easy is not None:
            self._settle_or_judge(future, easy, gold, question)
            return future
        known = row if self.config.function else gold
        task = self._pool.submit("response", known, response, True, self.config.thinking_end)
        task.add_done_callback(lambda graded: self._graded(future, graded, gold, question))
        return future

    def submit_text(self, gold: str, text: str, question: str = "") -> Future[Verdict]:
        """Return the future verdict of a bare answer, or of a text that need not hold a box."""
        future: Future[Verdict] = Future()
        task = self._pool.submit("text", gold, text)
        task.add_done_callback(lambda graded: self._graded(future, graded, gold, question))
        return future

    def equals_itself(self, gold: str) -> Future[Verdict]:
        """Return a future: CORRECT when the gold answer's own repetition is correct. The judge takes no part."""
        future: Future[Verdict] = Future()
        task = self._pool.submit("itself", gold, "")
        task.add_done_callback(lambda graded: self._graded(future, graded, gold, "", judged=False))
        return future

    def worker_pids(self) -> list[int]:
        """Return the process ids of the live workers."""
        return self._pool.pids()

    @property
    def replaced_workers(self) -> int:
        """Number of workers that died or were killed so far."""
        return self._pool.replaced

    def close(self) -> None:
        """End the worker processes and the judge's connections; pending verdicts are cancelled."""
        self._pool.close()
        if self._judge is not None:
            self._judge.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _easy(self, gold: str, response: str, finished: bool) -> Result | None:
        """Decide what needs no worker: a truncated response, one without a box, two integers.

        Linear in the length of the response; nothing is computed with the integers.
        """
        if not finished:
            return Result("incorrect", "truncated", None, 0.0)
        if self.config.function:
            return None
        if len(response) > _EASY_RESPONSE:
            return None
        extracted = extract.from_boxes(extract.after_thinking(response, self.config.thinking_end))
        if extracted is None:
            return Result("incorrect", "no answer", None, 0.0)
        equal = None if extracted.joined else rules.compare_integers(gold, extracted.answer)
        return None if equal is None else Result("correct" if equal else "incorrect", "exact", extracted.answer, 0.0)

    def _graded(
        self, future: Future[Verdict], graded: Future[Result], gold: str, question: str, judged: bool = True
    ) -> None:
        if copy_failure(graded, future):
            return
        try:
            self._settle_or_judge(future, graded.result(), gold, question, judged)
        except Exception as error:  # raised in a callback it would only be logged, and the future would never be done
            fail(future, error)

    def _settle_or_judge(
        self, future: Future[Verdict], result: Result, gold: str, question: str, judged: bool = True
    ) -> None:
        """Settle the verdict of the rules, or submit an answer that they call incorrect to the judge."""
        reason = result.reason or self._reason(result.method) if result.outcome == "unknown" else ""
        outcome = Outcome(result.outcome)
        verdict = Verdict(outcome, result.method, result.extracted, result.seconds, reason, reward=result.reward)
        answer = verdict.extracted
        if (
            self._judge is None
            or not judged
            or verdict.outcome is not Outcome.INCORRECT
            or answer is None
            or not self._judge.accepts(gold, answer)
        ):
            settle(future, verdict)
            return
        reply = self._judge.judge(question, gold, answer)
        reply.add_done_callback(lambda answered: self._judged(future, answered, verdict))

    def _reason(self, method: str) -> str:
        """Return why the rules came to no verdict."""
        if method == "time-out":
            return f"grading took more than {self.config.timeout_s:g} s (verify.timeout_s)"
        return f"a grading process failed, or exceeded {self.config.memory_mib} MiB (verify.memory_mib)"

    @staticmethod
    def _judged(future: Future[Verdict], reply: Future[Judgement], verdict: Verdict) -> None:
        if not copy_failure(reply, future):
            outcome, seconds, reason = reply.result()
            settle(future, Verdict(outcome, "judge", verdict.extracted, verdict.seconds + seconds, reason))

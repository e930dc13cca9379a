"""The verifier the trainer sees: responses in, Verdicts out. Rules in worker processes, then the judge where they
say WRONG."""

from __future__ import annotations

from concurrent.futures import Future

from oreal_megatron import config
from oreal_megatron.math_equality import extract, rules
from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.verify.futures import fail, follow, settle
from oreal_megatron.verify.judge import JudgeClient, JudgesDown
from oreal_megatron.verify.worker_pool import Pool, Result

__all__ = ["Grader", "JudgesDown"]
_EASY_RESPONSE = 200_000  # characters of a response that this process itself searches for a box


class Grader:
    """Grades from any thread; workers start with the first answer that needs one."""

    def __init__(self, config: config.VerifyConfig, pool: Pool | None = None, judge: JudgeClient | None = None) -> None:
        self.config = config
        self._pool = pool or Pool(config.workers, config.timeout_s, config.memory_mib)
        self._judge = judge or (JudgeClient(config.judge) if config.judge.urls else None)

    def submit(self, gold: str, response: str, finished: bool = True, question: str = "") -> Future[Verdict]:
        """The verdict to come. Never blocks. The future fails with JudgesDown when no judge host answered for
        `judge.all_down_wait_s`, and with PoolBroken when no worker process can be started."""
        future: Future[Verdict] = Future()
        easy = self._easy(gold, response, finished)
        if easy is not None:
            self._ruled(future, easy, gold, question)
            return future
        task = self._pool.submit("response", gold, response, True, self.config.thinking_end)
        task.add_done_callback(lambda done: self._graded(future, done, gold, question))
        return future

    def submit_text(self, gold: str, text: str, question: str = "") -> Future[Verdict]:
        """As `submit`, for a bare answer or a text of another program, which need not hold a box."""
        future: Future[Verdict] = Future()
        task = self._pool.submit("text", gold, text)
        task.add_done_callback(lambda done: self._graded(future, done, gold, question))
        return future

    def equals_itself(self, gold: str) -> Future[Verdict]:
        """Whether a gold answer can be graded: CORRECT when its own repetition is correct. Never asks the judge."""
        future: Future[Verdict] = Future()
        task = self._pool.submit("itself", gold, "")
        task.add_done_callback(lambda done: self._graded(future, done, gold, "", judged=False))
        return future

    def worker_pids(self) -> list[int]:
        """Process ids of the grading processes that live now."""
        return self._pool.pids()

    @property
    def replaced_workers(self) -> int:
        """Workers that died or were killed so far."""
        return self._pool.replaced

    def close(self) -> None:
        """Ends the worker processes and the judge's connections; verdicts still to come are cancelled."""
        self._pool.close()
        if self._judge is not None:
            self._judge.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _easy(self, gold: str, response: str, finished: bool) -> Result | None:
        """What needs no worker: a truncated response, and two whole numbers. Linear in the length, no arithmetic on
        them."""
        if not finished:
            return Result("incorrect", "truncated", None, 0.0)
        if len(response) > _EASY_RESPONSE:
            return None
        found = extract.from_boxes(extract.after_thinking(response, self.config.thinking_end))
        if found is None:
            return Result("incorrect", "no answer", None, 0.0)
        verdict = None if found.joined else rules.compare_integers(gold, found.answer)
        return None if verdict is None else Result("correct" if verdict else "incorrect", "exact", found.answer, 0.0)

    def _graded(
        self, future: Future[Verdict], done: Future[Result], gold: str, question: str, judged: bool = True
    ) -> None:
        if follow(future, done):
            return
        try:
            self._ruled(future, done.result(), gold, question, judged)
        except Exception as error:  # raised here it would only be logged, and whoever waits would wait for ever
            fail(future, error)

    def _ruled(self, future: Future[Verdict], result: Result, gold: str, question: str, judged: bool = True) -> None:
        """Settles what the rules decided, and asks the judge of answers they call wrong."""
        verdict = Verdict(Outcome(result.outcome), result.method, result.extracted, result.seconds)
        wrong = verdict.outcome is Outcome.INCORRECT and verdict.extracted is not None
        if self._judge is None or not judged or not wrong or not self._judge.asks_about(gold, verdict.extracted):
            settle(future, verdict)
            return
        asked = self._judge.submit(question, gold, verdict.extracted)
        asked.add_done_callback(lambda done: self._judged(future, done, verdict))

    @staticmethod
    def _judged(future: Future[Verdict], done: Future, verdict: Verdict) -> None:
        if not follow(future, done):
            outcome, seconds = done.result()
            settle(future, Verdict(outcome, "judge", verdict.extracted, verdict.seconds + seconds))

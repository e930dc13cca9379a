"""Verdicts of a step: each rank grades its rollouts during generation; then every rank gets all verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from oreal_megatron.config import RunStopped
from oreal_megatron.records import Outcome, Rollout, Verdict
from oreal_megatron.runtime import distributed, heartbeat
from oreal_megatron.runtime.chat_client import ServersDown
from oreal_megatron.verify.grader import Grader
from oreal_megatron.verify.worker_pool import PoolBroken

SHOWN_REASONS = 3  # most frequent ones of a step's unknown verdicts


class TooManyUnknown(RunStopped):
    """More verdicts of a step are unknown than verify.unknown_limit allows."""


class StepVerifier:
    """The Verifier of the loop: a grader on each rank, and one exchange of verdicts per step."""

    def __init__(self, grader: Grader, unknown_limit: float) -> None:
        self.grader, self.unknown_limit = grader, unknown_limit
        self.pending: dict[tuple[int, int], Future[Verdict]] = {}

    def close(self) -> None:
        """End the grading processes."""
        self.grader.close()

    def submit(self, rollout: Rollout) -> None:
        """Start grading one rollout of this rank."""
        prompt = rollout.prompt
        try:
            future = self.grader.submit(prompt.gold, rollout.text, rollout.finished, prompt.question, prompt.row)
        except Exception as error:  # no worker can be started: reported by verdicts(), on all ranks
            future = Future()
            future.set_exception(error)
        self.pending[rollout.key] = future

    def verdicts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
        """Return [P, K] verdicts on every rank; each rollout was submitted on one of them. Collective."""
        flat = iter(self.collect([rollout for row in rollouts for rollout in row]))
        table = [[next(flat) for _ in row] for row in rollouts]
        self.refuse_too_many_unknown([verdict for row in table for verdict in row])
        return table

    def collect(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Return verdicts on every rank, of rollouts that were submitted on one of them. Collective."""
        shares = distributed.all_gather_object(self._collect())
        if failures := [failure for _, failure in shares if failure]:
            raise RunStopped(failures[0])
        known = {key: verdict for share, _ in shares for key, verdict in share.items()}
        return [known[rollout.key] for rollout in rollouts]

    def _collect(self) -> tuple[dict[tuple[int, int], Verdict], str]:
        """Return this rank's verdicts, or an error text: a rank that raised alone would leave the others waiting."""
        pending, self.pending = self.pending, {}
        verdicts = {}
        try:
            for key, future in pending.items():
                verdicts[key] = future.result()
                heartbeat.beat()
        except (ServersDown, PoolBroken) as error:
            return {}, str(error)
        except Exception as error:  # a bug of the verifier
            return {}, f"grading rollout {key} failed with {error!r} on rank {distributed.rank()}; please report it"
        return verdicts, ""

    def refuse_too_many_unknown(self, verdicts: Sequence[Verdict]) -> None:
        """Raise TooManyUnknown where more of a step's verdicts are unknown than verify.unknown_limit allows."""
        unknown = [verdict for verdict in verdicts if verdict.outcome is Outcome.UNKNOWN]
        if len(unknown) > self.unknown_limit * len(verdicts):
            reasons = Counter(verdict.reason or verdict.method for verdict in unknown).most_common(SHOWN_REASONS)
            listed = "; ".join(f"{count} times {reason}" for reason, count in reasons)
            raise TooManyUnknown(
                f"{len(unknown)} of {len(verdicts)} verdicts are unknown, more than the {self.unknown_limit:.0%} that "
                f"verify.unknown_limit allows: {listed}. Nothing was trained on this step; fix the cause and resume"
            )

"""A pool of prompts between the loop and its dataset, engine and verifier: generation across steps.

The loop sees one object in their place: `take` returns the problems that enter, `generate` lets responses grow in
rounds until enough prompts are complete, and returns these; the others stay in the pool. What is decided and when:
pool_schedule.py. The state between two steps is a value, `pool`, which checkpoints contain (pool_file.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from oreal_megatron.config import Config, SamplingConfig
from oreal_megatron.protocols import Dataset, GrowingEngine, Metrics, RoundVerifier
from oreal_megatron.records import Prompt, Rollout, Verdict
from oreal_megatron.rollout import pool_file, pool_metrics, pool_schedule
from oreal_megatron.rollout.pool_schedule import PromptPool, StepEnd
from oreal_megatron.runtime import distributed, heartbeat, remote_values, rollout_exchange

log = logging.getLogger(__name__)


class RolloutPool:
    """Implementation of protocols.Dataset, RolloutEngine and Verifier on top of another one of each."""

    def __init__(self, config: Config, dataset: Dataset, engine: GrowingEngine, verifier: RoundVerifier):
        self.config, self.dataset, self.engine, self.verifier = config, dataset, engine, verifier
        self.pool, self.step_end = PromptPool(), StepEnd((), PromptPool(), ())
        self.step_metrics: Metrics = {}

    @property
    def version(self) -> int:
        """Updates of the policy whose weights the engine holds."""
        return self.engine.version

    def sleep(self) -> None:
        """Release the engine's memory."""
        self.engine.sleep()

    def problem(self, position: int) -> Prompt:
        """Return the problem at a position of the order in which the run visits them."""
        step, number = divmod(position, self.config.data.prompts_per_step)
        return self.dataset.take(step)[number]

    def take(self, step: int) -> list[Prompt]:
        """Return the problems that enter the pool in a step; changes nothing."""
        pool, _ = pool_schedule.drop_stale(self.pool, step, self.config)
        entering = pool_schedule.missing(pool, self.config)
        return [self.problem(position) for position in range(pool.next_position, pool.next_position + entering)]

    def submit(self, rollout: Rollout) -> None:
        """Start grading a complete rollout of this rank."""
        self.verifier.submit(rollout)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[list[Rollout]]:
        """Return the rollouts of the prompts that the step trains, oldest first, on every rank. Collective.

        The pool changes at the end only: where generation is interrupted, it is still that of the step before.
        """
        started_at, waited_s, step = time.monotonic(), 0.0, seed[1]
        pool, stale = pool_schedule.drop_stale(self.pool, step, self.config)
        pool = start = pool_schedule.admit(pool, prompts, step, self.config)
        round_tokens = self.config.rollout.round_tokens
        for round_number in itertools.count():
            growing = pool_schedule.next_round(pool, self.engine.replicas, self.config)
            if not growing or (round_number and pool_schedule.is_over(pool, step, self.config)):
                break
            grown = self.engine.extend(growing, sampling, seed, on_rollout, round_tokens)
            waited_s += time.monotonic() - heartbeat.progress.beat_at
            pool = pool_schedule.grow(pool, grown)
            if self.config.rollout.enough == "mixed":
                pool = self._grade(pool)
        end = pool_schedule.end_step(pool, step, self.config)
        self.step_metrics = pool_metrics.of_step(start, end, stale, self.version, self.config)
        self.step_metrics["rollout/rounds"] = round_number
        self.step_metrics["speed/idle/generate"] = _mean_share(waited_s, time.monotonic() - started_at)
        self.pool, self.step_end = end.pool, end
        return [[_as_trained(rollout, self.version) for rollout in prompt.rollouts] for prompt in end.trained]

    def verdicts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
        """Return [P, K] verdicts of the prompts that `generate` returned, on every rank. Collective.

        Rollouts that became complete in this step and stay in the pool are graded too; their verdicts stay with them.
        """
        end = self.step_end
        everything = PromptPool(end.trained + end.pool.prompts)
        graded = {prompt.slot: prompt for prompt in self._grade(everything).prompts}
        self.pool = dataclasses.replace(end.pool, prompts=tuple(graded[prompt.slot] for prompt in end.pool.prompts))
        table = [[verdict for verdict in graded[prompt.slot].verdicts if verdict is not None] for prompt in end.trained]
        self.verifier.refuse_too_many_unknown([verdict for row in table for verdict in row])
        return table

    def restore(self, checkpoint: Path | None, step: int) -> None:
        """Continue with the pool of a checkpoint; with an empty one behind the problems of `step` steps without it."""
        pool = pool_file.read(checkpoint, self.problem) if checkpoint else None
        if checkpoint and pool is None:
            log.warning("%s has no rollouts in flight: the run was not made with rollout.round_tokens", checkpoint)
        pool = pool or PromptPool(next_position=step * self.config.data.prompts_per_step)
        own = [rollout if self.engine.is_own(rollout) else self._without_values(rollout) for rollout in pool.rollouts()]
        self.pool = pool_schedule.grow(pool, own)

    def attachments(self) -> dict[str, bytes]:
        """Return what a checkpoint contains of the pool, on the first rank; {} on the others. Collective."""
        pool = pool_schedule.grow(self.pool, rollout_exchange.gather(list(self.pool.rollouts())))
        return {pool_file.NAME: pool_file.to_bytes(pool)} if distributed.rank() == 0 else {}

    def metrics(self) -> Metrics:
        """Return the metrics of the last step's generation. Not collective."""
        return self.step_metrics

    def _without_values(self, rollout: Rollout) -> Rollout:
        """Return a rollout of another replica as this rank knows it."""
        return remote_values.without_values(rollout, rollout.replica(self.engine.replicas))

    def _grade(self, pool: PromptPool) -> PromptPool:
        """Return the pool with verdicts of all complete rollouts. Collective."""
        rollouts = pool_schedule.ungraded(pool, self.config)
        verdicts = self.verifier.collect(rollouts)
        return pool_schedule.grade(pool, {rollout.key: v for rollout, v in zip(rollouts, verdicts, strict=True)})


def _as_trained(rollout: Rollout, version: int) -> Rollout:
    """Return a rollout with the number of its first tokens that versions before this one wrote."""
    runs = rollout.versions or ((rollout.version, len(rollout.tokens)),)
    return dataclasses.replace(rollout, carried=sum(tokens for earlier, tokens in runs if earlier < version))


def _mean_share(waited_s: float, seconds: float) -> float:
    """Return the mean share of their time in which ranks waited for the slowest one. Collective."""
    shares = distributed.all_gather_object(waited_s / seconds if seconds else 0.0)
    return sum(shares) / len(shares)

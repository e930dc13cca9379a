"""An engine without vLLM whose responses have lengths from a script, and grow in rounds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict
from oreal_megatron.rollout import growth
from oreal_megatron.runtime import distributed
from oreal_megatron.runtime.remote_values import is_local


class ScriptedDataset:
    """Problems numbered in the order of the run; `question` is their position."""

    def __init__(self, per_step: int):
        self.per_step = per_step

    def take(self, step: int) -> list[Prompt]:
        first = step * self.per_step
        return [Prompt(i, str(i), str(i), None, (1, 2, 3)) for i in range(first, first + self.per_step)]


class ScriptedEngine:
    """Responses of `length(position, index)` tokens, drawn from seed, step, slot, index, tokens so far and version.

    `replica`: the one of this rank, which knows of the others' responses what the exchange tells; None: has them all.
    """

    def __init__(self, length: Callable[[int, int], int], limit: int, replicas: int = 1, replica: int | None = None):
        self.length, self.limit, self.replicas, self.replica, self.version = length, limit, replicas, replica, 0
        self.calls: list[list[Rollout]] = []

    def sleep(self) -> None: ...

    def is_own(self, rollout: Rollout) -> bool:
        return self.replica in (None, rollout.replica(self.replicas))

    def generate(self, prompts, sampling, seed, on_rollout=None):
        per_prompt = sampling.rollouts_per_prompt
        grown = self.extend(growth.blank_rollouts(prompts, per_prompt), sampling, seed, on_rollout)
        return [grown[start : start + per_prompt] for start in range(0, len(grown), per_prompt)]

    def extend(self, rollouts, sampling, seed, on_rollout=None, round_tokens=0):
        self.calls.append(list(rollouts))
        grown = [self._grow(rollout, seed, round_tokens) for rollout in rollouts if self.is_own(rollout)]
        for rollout in grown:
            if on_rollout and (rollout.finished or len(rollout.tokens) >= self.limit):
                on_rollout(rollout)
        return growth.gather_growth(grown, rollouts, self.version, self.replicas)

    def _grow(self, rollout: Rollout, seed, round_tokens: int) -> Rollout:
        length = min(self.length(int(rollout.prompt.question), rollout.index), self.limit)
        count = min(round_tokens or length, length - len(rollout.tokens))
        chance = random.Random(f"{seed} {rollout.key} {len(rollout.tokens)} {self.version}")
        tokens = tuple(chance.randrange(5, 50) for _ in range(count))
        finished = len(rollout.tokens) + count == self.length(int(rollout.prompt.question), rollout.index)
        logprobs = tuple(-chance.random() for _ in tokens)
        longer = growth.append(rollout, tokens, logprobs, finished, self.version)
        return dataclasses.replace(longer, text=" ".join(map(str, longer.tokens)) if finished else "")


class ScriptedVerifier:
    """Verdicts by `correct(rollout)`; refuses rollouts that were not submitted, or twice."""

    def __init__(self, correct: Callable[[Rollout], bool]):
        self.correct, self.pending, self.graded = correct, {}, 0

    def submit(self, rollout: Rollout) -> None:
        assert rollout.key not in self.pending
        self.pending[rollout.key] = rollout

    def collect(self, rollouts):
        pending, self.pending = self.pending, {}
        self.graded += len(rollouts)
        own = [rollout for rollout in rollouts if is_local(rollout.tokens)]
        assert all(pending[rollout.key].tokens == rollout.tokens for rollout in own)
        shares = distributed.all_gather_object({rollout.key: self._judge(rollout) for rollout in own})
        verdicts = {key: verdict for share in shares for key, verdict in share.items()}
        return [verdicts[rollout.key] for rollout in rollouts]

    def _judge(self, rollout: Rollout) -> Verdict:
        return Verdict(Outcome.CORRECT if self.correct(rollout) else Outcome.INCORRECT, "exact", "1")

    def refuse_too_many_unknown(self, verdicts) -> None:
        assert None not in verdicts

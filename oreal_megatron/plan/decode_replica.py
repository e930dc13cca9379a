"""One engine replica of the rollout simulation: its active rollouts decode together, one token each per step."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from oreal_megatron.models import flops
from oreal_megatron.plan import timing
from oreal_megatron.plan.scenario import Scenario


@dataclass
class SimulatedPrompt:
    """A prompt with its rollouts."""

    rollouts: list[SimulatedRollout]
    first_step: int  # step in which it was drawn
    unfinished: int  # rollouts


@dataclass(eq=False)
class SimulatedRollout:
    """A response in the making."""

    prompt: SimulatedPrompt
    length: int  # tokens it will have
    first_step: int  # step in which its prompt was drawn
    expected: float  # what is known of its length in advance
    decoded: float = 0.0

    @property
    def finished(self) -> bool:
        """True if all its tokens are decoded."""
        return self.decoded >= self.length


@dataclass(frozen=True)
class DecodeCost:
    """Costs of a replica, as in `timing.generation`: weights and cached tokens are read, rows are multiplied."""

    weights_s: float  # to read the weights
    cached_token_s: float  # to read keys and values of one token
    row_s: float  # to multiply one token with all weights
    overhead_s: float
    prefill_token_s: float
    slots: int  # rollouts at once
    cache_tokens: float  # capacity of the KV cache
    start_s: float = 0.0  # to start a rollout, also in each further round, beside its prefill

    @classmethod
    def of(cls, scenario: Scenario) -> DecodeCost:
        """Return the costs of a replica of a scenario."""
        engine, assumed = scenario.config.engine, scenario.assumed
        bandwidth = scenario.gpu.memory_bytes * assumed.memory_share
        row = 2 * flops.matrix_elements(scenario.arch) / (engine.tensor * scenario.gpu.flops * assumed.prefill_mfu)
        return cls(
            weights_s=scenario.engine_weights() / bandwidth,
            cached_token_s=scenario.cache_token() / bandwidth,
            row_s=row,
            overhead_s=timing.step_overhead(scenario),
            prefill_token_s=row,
            slots=engine.max_num_seqs,
            cache_tokens=engine.kv_cache_gib * 2**30 / scenario.cache_token(),
        )

    def step_s(self, rows: int, cached: float) -> float:
        """Return the seconds of one decoding step of `rows` rollouts with `cached` tokens in all."""
        return max(self.weights_s + cached * self.cached_token_s, rows * self.row_s) + self.overhead_s


@dataclass
class Replica:
    """An engine replica that advances from one finished rollout to the next.

    A rollout starts if a slot is free and the cache holds all started ones at their final lengths: the simulation
    knows them, vLLM would start them and preempt some later.
    """

    cost: DecodeCost
    prompt_tokens: float
    prefills: bool = True  # False: the prefix cache holds what a started rollout has decoded
    now: float = 0.0
    busy: float = 0.0  # seconds with at least one rollout
    row_seconds: float = 0.0  # seconds x active rollouts
    history: list[tuple[float, int]] = field(default_factory=list)  # (time, active rollouts) at every change
    active: list[tuple[float, int, SimulatedRollout]] = field(default_factory=list)  # heap by decoded mark at the end
    decoded: float = 0.0  # mark: tokens that a rollout decoded which is active since the start
    cached: float = 0.0
    reserved: float = 0.0
    numbers: itertools.count = field(default_factory=itertools.count)

    def start_all(self, take: Callable[[Replica], SimulatedRollout | None]) -> None:
        """Start rollouts from `take`, which looks whether the next one `fits`, until it returns None."""
        while rollout := take(self):
            present = self.prompt_tokens + rollout.decoded
            self._pass(self.cost.start_s + self.prefills * present * self.cost.prefill_token_s)
            heapq.heappush(self.active, (self.decoded + rollout.length - rollout.decoded, next(self.numbers), rollout))
            self.cached += present
            self.reserved += self.prompt_tokens + rollout.length
        self.history.append((self.now, len(self.active)))

    def fits(self, rollout: SimulatedRollout) -> bool:
        """Return whether a rollout can start now; an idle replica starts any."""
        return self.has_room(len(self.active), self.reserved, rollout)

    def has_room(self, active: int, reserved: float, rollout: SimulatedRollout) -> bool:
        """Return whether a rollout fits beside `active` ones that reserve so many tokens of the cache."""
        room = reserved + self.prompt_tokens + rollout.length <= self.cost.cache_tokens
        return not active or (active < self.cost.slots and room)

    def next_finish(self) -> float:
        """Return the time at which the first active rollout finishes."""
        return self.now + self._tokens_to_finish() * self._step_s()

    def finish_next(self) -> SimulatedRollout:
        """Decode until the first active rollout finishes, and return it."""
        tokens = self._tokens_to_finish()
        self._decode(tokens, tokens * self._step_s())
        _, _, rollout = heapq.heappop(self.active)
        rollout.decoded = rollout.length
        self.cached -= self.prompt_tokens + rollout.length
        self.reserved -= self.prompt_tokens + rollout.length
        return rollout

    def stop(self, time: float) -> None:
        """Decode until `time` and give up the active rollouts, with the tokens that they have."""
        if self.active and time > self.now:
            self._decode((time - self.now) / self._step_s(), time - self.now)
        self.busy -= max(0.0, self.now - time)  # a prefill that is cut off
        for mark, _, rollout in self.active:
            rollout.decoded = max(0.0, min(rollout.length - (mark - self.decoded), rollout.length - 1))
        self.active.clear()
        self.cached = self.reserved = 0.0
        self.history.append((self.now, 0))

    def _tokens_to_finish(self) -> float:
        return self.active[0][0] - self.decoded

    def _step_s(self) -> float:
        """Seconds of a decoding step, at the mean number of cached tokens until the next rollout finishes."""
        rows = len(self.active)
        return self.cost.step_s(rows, self.cached + rows * self._tokens_to_finish() / 2)

    def _decode(self, tokens: float, seconds: float) -> None:
        self.decoded += tokens
        self.cached += tokens * len(self.active)
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds
        self.row_seconds += seconds * len(self.active)


def take_from(queue: deque[SimulatedRollout]) -> Callable[[Replica], SimulatedRollout | None]:
    """Return a function that takes the next rollout of a queue if the replica has room for it."""

    def take(replica: Replica) -> SimulatedRollout | None:
        return queue.popleft() if queue and replica.fits(queue[0]) else None

    return take

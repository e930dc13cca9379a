"""Discrete-event simulation of generation over many steps, under policies for the long tail of response lengths."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from oreal_megatron.config import RolloutConfig
from oreal_megatron.plan.decode_replica import DecodeCost, Replica, SimulatedPrompt, SimulatedRollout, take_from
from oreal_megatron.plan.response_lengths import LengthSource
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.plan.simulated_rounds import run_round

WARM_UP, STEPS = 6, 12  # steps simulated before the counted ones, so that carried rollouts are in balance; counted


@dataclass(frozen=True)
class RolloutPolicy:
    """Rules by which a step's rollouts are generated."""

    name: str
    deal: Literal["prompts", "rollouts", "queue"] = "queue"
    """Replicas get all rollouts of some prompts, or some rollouts of all; or take from one queue, longest first."""
    pool: float = 1.0  # prompts in flight, as a multiple of those a step trains on; above 1 the step ends early
    carry: bool = False  # unfinished rollouts continue in the next step; else they are aborted
    separate: float = 0.0  # share of the GPUs that only generate, one step ahead of training; 0: colocated
    staleness: int = 4  # steps after which a carried prompt is waited for
    round_tokens: int = 0  # tokens of a round, after which the step may end; 0: it ends with any response

    def __post_init__(self) -> None:
        """Refuse a pool whose prompts would wait longer than the bound even when they are complete."""
        if self.carry and self.pool > self.staleness + 1:
            raise ValueError(f"a pool of {self.pool:g} steps' prompts cannot be trained within {self.staleness} steps")


PROMPTS = RolloutPolicy("prompts dealt to replicas", deal="prompts")
ROLLOUTS = RolloutPolicy("rollouts dealt to replicas", deal="rollouts")  # what the engine does
POLICIES = (
    PROMPTS,
    ROLLOUTS,
    RolloutPolicy("common queue"),
    RolloutPolicy("over-sampling 1.25, abort", pool=1.25),
    RolloutPolicy("over-sampling 1.5, abort", pool=1.5),
    RolloutPolicy("partial rollouts, pool 1.5", pool=1.5, carry=True),
    RolloutPolicy("partial rollouts, pool 2", pool=2.0, carry=True),
    RolloutPolicy("pool=1.5 staleness=1 round_tokens=512", "rollouts", 1.5, True, 0.0, 1, 512),
    RolloutPolicy("pool=2 staleness=2 round_tokens=512", "rollouts", 2.0, True, 0.0, 2, 512),
)
SEPARATE = (0.5, 0.75, 0.875)  # shares of generating GPUs that are tried for one step ahead


@dataclass(frozen=True)
class PolicyResult:
    """Means over the counted steps of one policy."""

    policy: RolloutPolicy
    generation_s: float
    step_s: float
    idle_share: float  # of the replicas' time in generation
    mean_active: float  # rollouts of a replica at once, over generation
    aborted_share: float  # of all decoded tokens
    length_ratio: float  # mean length of trained rollouts / of drawn ones: 1 without bias towards short ones
    staleness: float  # mean steps between a prompt's first token and its training
    oldest: int  # the most of them
    tokens_per_gpu_second: float
    timelines: list[list[tuple[float, int]]]  # of the last step: (seconds, active rollouts) of each replica


def policy_of(config: RolloutConfig) -> RolloutPolicy | None:
    """Return the policy of a recipe's section `rollout`; None where it is off, as in ROLLOUTS. `enough` is ignored."""
    if not config.enabled:
        return None
    bound = config.staleness if config.carry else 0
    return RolloutPolicy("the recipe's", "rollouts", config.pool, config.carry, 0.0, bound, config.round_tokens)


def compare(scenario: Scenario, other_s: float, lengths: LengthSource, seed: int = 0) -> list[PolicyResult]:
    """Simulate every policy; `other_s`: seconds of a step beside generation, on all GPUs."""
    own = policy_of(scenario.config.rollout)
    policies = POLICIES if own is None else (*POLICIES, own)
    outcomes = [simulate(scenario, other_s, policy, lengths, seed) for policy in policies]
    best = max(outcomes, key=lambda outcome: outcome.tokens_per_gpu_second).policy
    ahead = [
        dataclasses.replace(best, name=f"one step ahead, {share:.1%} of the GPUs generate", separate=share)
        for share in SEPARATE
        if scenario.replicas * share % 1 == 0
    ]
    tried = [simulate(scenario, other_s, policy, lengths, seed) for policy in ahead]
    return outcomes + sorted(tried, key=lambda outcome: -outcome.tokens_per_gpu_second)[:1]


def simulate(
    scenario: Scenario,
    other_s: float,
    policy: RolloutPolicy,
    lengths: LengthSource,
    seed: int,
    cost: DecodeCost | None = None,
) -> PolicyResult:
    """Simulate WARM_UP + STEPS steps of one policy; the seed fixes the lengths, whatever the policy.

    `cost`: measured costs of a replica; None: those of the plan.
    """
    simulation = _Simulation(scenario, policy, lengths, seed, cost or DecodeCost.of(scenario))
    steps = [simulation.step(number) for number in range(WARM_UP + STEPS)][WARM_UP:]
    generation = float(np.mean([step.seconds for step in steps]))
    if policy.separate:
        step_s = max(generation, other_s / (1 - policy.separate))
    else:
        step_s = generation + other_s
    trained = [prompt for step in steps for prompt in step.trained]
    tokens = sum(rollout.length for prompt in trained for rollout in prompt.rollouts)
    prompt_tokens = scenario.assumed.prompt_tokens * sum(len(prompt.rollouts) for prompt in trained)
    replicas = len(steps[0].busy)
    waits = [number - prompt.first_step for number, step in enumerate(steps, WARM_UP) for prompt in step.trained]
    return PolicyResult(
        policy,
        generation,
        step_s,
        max(0.0, 1 - sum(sum(step.busy) for step in steps) / (replicas * sum(step.seconds for step in steps))),
        sum(step.row_seconds for step in steps) / (replicas * sum(step.seconds for step in steps)),
        sum(step.aborted for step in steps) / sum(step.decoded for step in steps),
        tokens / sum(len(prompt.rollouts) for prompt in trained) / simulation.mean_length,
        float(np.mean(waits)) + bool(policy.separate),
        max(waits) + bool(policy.separate),
        (tokens + prompt_tokens) / (len(steps) * step_s) / scenario.world,
        steps[-1].timelines,
    )


@dataclass(frozen=True)
class _Step:
    seconds: float
    trained: list[SimulatedPrompt]
    busy: list[float]
    row_seconds: float
    decoded: float
    aborted: float
    timelines: list[list[tuple[float, int]]]


class _Simulation:
    """State between steps: the pool of prompts in flight."""

    def __init__(
        self, scenario: Scenario, policy: RolloutPolicy, lengths: LengthSource, seed: int, cost: DecodeCost
    ) -> None:
        self.scenario, self.policy, self.cost = scenario, policy, cost
        self.prompts = scenario.config.data.prompts_per_step
        self.replicas = max(1, round(scenario.replicas * (policy.separate or 1.0)))
        random = np.random.default_rng(seed)
        needed = round(self.prompts * (policy.pool + 1)) * (WARM_UP + STEPS)
        drawn = lengths.draw(random, needed, scenario.config.sampling.rollouts_per_prompt)
        self.mean_length = float(drawn.mean())
        self.drawn = iter(drawn)
        self.pool: list[SimulatedPrompt] = []

    def step(self, number: int) -> _Step:
        """Generate until enough prompts are complete; carry or abort what is unfinished."""
        while len(self.pool) < round(self.prompts * self.policy.pool):
            row = next(self.drawn)
            prompt = SimulatedPrompt([], number, len(row))
            prompt.rollouts = [SimulatedRollout(prompt, int(n), number, float(row.mean())) for n in row]
            self.pool.append(prompt)
        before = sum(rollout.decoded for prompt in self.pool for rollout in prompt.rollouts)
        replicas = [Replica(self.cost, self.scenario.assumed.prompt_tokens) for _ in range(self.replicas)]
        if self.policy.round_tokens:
            end = self._run_rounds(replicas, number)
        else:
            end = self._run(replicas, self._queues(), number)
        for replica in replicas:
            replica.stop(end)
        decoded = sum(rollout.decoded for prompt in self.pool for rollout in prompt.rollouts) - before
        trained, aborted = self._take_trained(number)
        timelines = [replica.history for replica in replicas]
        busy, row_seconds = [replica.busy for replica in replicas], sum(replica.row_seconds for replica in replicas)
        return _Step(end, trained, busy, row_seconds, decoded, aborted, timelines)

    def _queues(self) -> list[deque[SimulatedRollout]]:
        """Return one queue for each replica; with deal="queue" it is the same one for all."""
        waiting = [[rollout for rollout in prompt.rollouts if not rollout.finished] for prompt in self.pool]
        if self.policy.deal != "queue":
            queues: list[deque[SimulatedRollout]] = [deque() for _ in range(self.replicas)]
            spread = self.policy.deal == "rollouts"
            for slot, rollouts in enumerate(waiting):
                for index, rollout in enumerate(rollouts):
                    queues[(slot + index * spread) % self.replicas].append(rollout)
            return queues
        ordered = sorted(sum(waiting, []), key=lambda rollout: (rollout.first_step, -rollout.expected))
        return [deque(ordered)] * self.replicas

    def _run(self, replicas: list[Replica], queues: list[deque[SimulatedRollout]], number: int) -> float:
        """Advance the replicas from event to event; return the time at which the step ends."""
        takers = [take_from(queue) for queue in queues]
        first = _deal_evenly(queues[0], replicas) if self.policy.deal == "queue" else queues
        for replica, queue in zip(replicas, first, strict=True):
            replica.start_all(take_from(queue))
        events = [(replica.next_finish(), index) for index, replica in enumerate(replicas) if replica.active]
        heapq.heapify(events)
        left = self.prompts - sum(not p.unfinished for p in self.pool)
        overdue = {id(p) for p in self.pool if p.unfinished and p.first_step <= number - self.policy.staleness}
        end = 0.0
        while events and (left > 0 or overdue):
            end, index = heapq.heappop(events)
            prompt = replicas[index].finish_next().prompt
            prompt.unfinished -= 1
            if not prompt.unfinished:
                left -= 1
                overdue.discard(id(prompt))
            replicas[index].start_all(takers[index])
            if replicas[index].active:
                heapq.heappush(events, (replicas[index].next_finish(), index))
        return end

    def _run_rounds(self, replicas: list[Replica], number: int) -> float:
        """Advance all replicas round by round; return the time at which the step ends."""
        end, first = 0.0, True
        while any(prompt.unfinished for prompt in self.pool):
            end = run_round(replicas, self._queues(), self.policy.round_tokens, first, end)
            first = False
            overdue = [p for p in self.pool if p.unfinished and p.first_step <= number - self.policy.staleness]
            if sum(not p.unfinished for p in self.pool) >= self.prompts and not (self.policy.carry and overdue):
                break
        return end

    def _take_trained(self, number: int) -> tuple[list[SimulatedPrompt], float]:
        """Remove the step's prompts from the pool, oldest first; return them and the tokens that are thrown away."""
        complete = sorted(
            (prompt for prompt in self.pool if not prompt.unfinished), key=lambda prompt: prompt.first_step
        )
        trained = complete[: self.prompts]
        chosen = {id(prompt) for prompt in trained}
        left_over = [prompt for prompt in self.pool if id(prompt) not in chosen]
        if self.policy.carry:
            self.pool = left_over
            return trained, 0.0
        self.pool = []
        return trained, sum(rollout.decoded for prompt in left_over for rollout in prompt.rollouts)


def _deal_evenly(queue: deque[SimulatedRollout], replicas: list[Replica]) -> list[deque[SimulatedRollout]]:
    """Take as many rollouts from the queue as start at once, each for the replica with least expected tokens."""
    dealt: list[deque[SimulatedRollout]] = [deque() for _ in replicas]
    loads = [(0.0, index) for index in range(len(replicas))]
    while queue and loads:
        load, index = heapq.heappop(loads)
        reserved = sum(replicas[index].prompt_tokens + rollout.length for rollout in dealt[index])
        if replicas[index].has_room(len(dealt[index]), reserved, queue[0]):
            rollout = queue.popleft()
            dealt[index].append(rollout)
            heapq.heappush(loads, (load + rollout.expected, index))
    return dealt

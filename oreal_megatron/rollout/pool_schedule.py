"""Decisions about a pool of prompts in flight: who enters, what grows in a round, when a step ends, what it trains.

Every function is pure and gives the same result on every rank. A response grows in rounds of `rollout.round_tokens`;
after each, all ranks know the same lengths and ends, so that nothing depends on how fast a rank is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from oreal_megatron.config import Config
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict

Key = tuple[int, int]  # slot and index of a rollout


@dataclass(frozen=True, slots=True)
class PooledPrompt:
    """A prompt in flight, with its K rollouts as far as they have grown and the verdicts that are known."""

    position: int  # in the order in which the run visits its problems
    first_step: int  # step in which it entered
    rollouts: tuple[Rollout, ...]  # [K]
    verdicts: tuple[Verdict | None, ...]  # [K], None: not graded

    @property
    def slot(self) -> int:
        """Position in the pool."""
        return self.rollouts[0].slot

    @property
    def is_mixed(self) -> bool:
        """True with correct and incorrect rollouts."""
        return {Outcome.CORRECT, Outcome.INCORRECT} <= {verdict.outcome for verdict in self.verdicts if verdict}


@dataclass(frozen=True, slots=True)
class PromptPool:
    """Prompts in flight between two steps, oldest first."""

    prompts: tuple[PooledPrompt, ...] = ()
    next_position: int = 0  # of the problem that enters next

    def rollouts(self) -> Iterator[Rollout]:
        """Iterate over the rollouts, oldest prompt first."""
        return (rollout for prompt in self.prompts for rollout in prompt.rollouts)


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Outcome of the last decision of a step."""

    trained: tuple[PooledPrompt, ...]
    pool: PromptPool  # what stays in flight
    discarded: tuple[PooledPrompt, ...]  # with rollout.carry=false


def response_limit(prompt: Prompt, config: Config) -> int:
    """Return the most tokens of a response: sampling.max_new_tokens, or the room beside the prompt."""
    return min(config.sampling.max_new_tokens, config.engine.max_model_len - len(prompt.tokens))


def is_open(rollout: Rollout, config: Config) -> bool:
    """Return whether a response can still grow: it has neither a stop token nor its full length."""
    return not rollout.finished and len(rollout.tokens) < response_limit(rollout.prompt, config)


def is_complete(prompt: PooledPrompt, config: Config) -> bool:
    """Return whether no rollout of a prompt can grow."""
    return not any(is_open(rollout, config) for rollout in prompt.rollouts)


def drop_stale(pool: PromptPool, step: int, config: Config) -> tuple[PromptPool, tuple[PooledPrompt, ...]]:
    """Return the pool without the prompts that are older than the bound, and these.

    No step leaves such prompts; a resumed run with a smaller rollout.staleness finds them in its checkpoint.
    """
    fresh = tuple(prompt for prompt in pool.prompts if step - prompt.first_step <= config.rollout.staleness)
    stale = tuple(prompt for prompt in pool.prompts if step - prompt.first_step > config.rollout.staleness)
    return dataclasses.replace(pool, prompts=fresh), stale


def missing(pool: PromptPool, config: Config) -> int:
    """Return how many prompts may enter."""
    return max(round(config.data.prompts_per_step * config.rollout.pool) - len(pool.prompts), 0)


def admit(pool: PromptPool, prompts: Sequence[Prompt], step: int, config: Config) -> PromptPool:
    """Let the next problems enter, each at the lowest free slot."""
    used = {prompt.slot for prompt in pool.prompts}
    slots = [slot for slot in range(len(used) + len(prompts)) if slot not in used]
    indices = range(config.sampling.rollouts_per_prompt)
    entered = tuple(
        PooledPrompt(
            pool.next_position + number,
            step,
            tuple(Rollout(prompt, slot, index, (), "", False) for index in indices),
            (None,) * len(indices),
        )
        for number, (prompt, slot) in enumerate(zip(prompts, slots, strict=False))
    )
    return PromptPool(pool.prompts + entered, pool.next_position + len(prompts))


def next_round(pool: PromptPool, replicas: int, config: Config) -> list[Rollout]:
    """Return the rollouts that grow in the next round: of each replica the oldest that it can run at once."""
    room = dict.fromkeys(range(replicas), config.engine.max_num_seqs)
    growing = []
    for rollout in pool.rollouts():
        replica = rollout.replica(replicas)
        if is_open(rollout, config) and room[replica]:
            room[replica] -= 1
            growing.append(rollout)
    return growing


def grow(pool: PromptPool, grown: Sequence[Rollout]) -> PromptPool:
    """Put rollouts that have grown in the place of what they were."""
    by_key = {rollout.key: rollout for rollout in grown}
    prompts = tuple(
        dataclasses.replace(prompt, rollouts=tuple(by_key.get(rollout.key, rollout) for rollout in prompt.rollouts))
        for prompt in pool.prompts
    )
    return dataclasses.replace(pool, prompts=prompts)


def ungraded(pool: PromptPool, config: Config) -> list[Rollout]:
    """Return the complete rollouts without a verdict."""
    return [
        rollout
        for prompt in pool.prompts
        for rollout, verdict in zip(prompt.rollouts, prompt.verdicts, strict=True)
        if verdict is None and not is_open(rollout, config)
    ]


def grade(pool: PromptPool, verdicts: Mapping[Key, Verdict]) -> PromptPool:
    """Enter verdicts, by slot and index."""
    prompts = tuple(
        dataclasses.replace(
            prompt,
            verdicts=tuple(
                verdicts.get(rollout.key, verdict)
                for rollout, verdict in zip(prompt.rollouts, prompt.verdicts, strict=True)
            ),
        )
        for prompt in pool.prompts
    )
    return dataclasses.replace(pool, prompts=prompts)


def is_over(pool: PromptPool, step: int, config: Config) -> bool:
    """Return whether a step's generation ends: enough prompts are complete, and all that must not get older."""
    complete = [prompt for prompt in pool.prompts if is_complete(prompt, config)]
    if len(complete) == len(pool.prompts):
        return True
    overdue = [prompt for prompt in pool.prompts if _is_overdue(prompt, step, config)]
    if not all(is_complete(prompt, config) for prompt in overdue):
        return False
    enough = [prompt for prompt in complete if config.rollout.enough == "complete" or prompt.is_mixed]
    return len(enough) >= config.data.prompts_per_step


def end_step(pool: PromptPool, step: int, config: Config) -> StepEnd:
    """Choose what a step trains: the oldest complete prompts, until there are enough.

    With enough="mixed" prompts without both outcomes come along, so that metrics are of all prompts. Prompts that must
    not get older come along too. The others stay, or are discarded with rollout.carry=false.
    """
    trained: list[PooledPrompt] = []
    counted = 0
    for prompt in pool.prompts:
        counts = config.rollout.enough == "complete" or prompt.is_mixed
        needed = counted < config.data.prompts_per_step or _is_overdue(prompt, step, config)
        if is_complete(prompt, config) and needed:
            trained.append(prompt)
            counted += counts
    chosen = {prompt.slot for prompt in trained}
    others = tuple(prompt for prompt in pool.prompts if prompt.slot not in chosen)
    if config.rollout.carry:
        return StepEnd(tuple(trained), dataclasses.replace(pool, prompts=others), ())
    return StepEnd(tuple(trained), dataclasses.replace(pool, prompts=()), others)


def _is_overdue(prompt: PooledPrompt, step: int, config: Config) -> bool:
    """Return whether a prompt would be too old in the next step."""
    return config.rollout.carry and step - prompt.first_step >= config.rollout.staleness

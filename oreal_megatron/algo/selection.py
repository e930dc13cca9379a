"""Selection of a step's training samples from verdicts, with their advantages."""

from __future__ import annotations

import random
from collections.abc import Sequence

from oreal_megatron.algo import advantages
from oreal_megatron.algo.response_penalties import KINDS
from oreal_megatron.config import SelectionConfig
from oreal_megatron.records import Counts, Outcome, Rollout, Sample, Verdict

REWARD = {Outcome.CORRECT: 1.0, Outcome.INCORRECT: -1.0}


def reward_of(verdict: Verdict) -> float:
    """Return the reward of a known verdict."""
    return REWARD[verdict.outcome] if verdict.reward is None else verdict.reward


def samples(
    rollouts: Sequence[Sequence[Rollout]],  # [P, K]
    verdicts: Sequence[Sequence[Verdict]],  # [P, K]
    config: SelectionConfig,
    seed: tuple[int, int],
) -> list[Sample]:
    """Select prompts with 0 < pass rate < 1, and a correct and an incorrect rollout of each (paper, Algorithm 1).

    keep="mixed" selects all rollouts of these prompts. keep="all" selects those of the other prompts too, as the
    authors' run without reward model does: against a baseline their advantage is 0, so they count in the denominators
    and in the KL term only.
    Advantages are computed over all rollouts of a prompt with a known verdict; UNKNOWN ones are neither selected nor
    counted. A penalised rollout counts as incorrect, with the reward of a penalty. The choice depends on `seed` and the
    prompt's slot only, not on other prompts. Of tokens only the number is read, so that all ranks select alike.
    """
    selected: list[Sample] = []
    for row, judged in zip(rollouts, verdicts, strict=True):
        known = [
            (rollout, config.penalties.reward if verdict.penalty else reward_of(verdict))
            for rollout, verdict in zip(row, judged, strict=True)
            if verdict.outcome in REWARD
        ]
        selected += _select_of_prompt(known, config, seed)
    return selected


def _select_of_prompt(
    known: list[tuple[Rollout, float]], config: SelectionConfig, seed: tuple[int, int]
) -> list[Sample]:
    """Select from the rollouts of one prompt, given with their rewards."""
    rewards = [reward for _, reward in known]
    mixed = len(set(rewards)) > 1  # else all correct, all incorrect, or none known: nothing to compare
    if not mixed and config.keep != "all":
        return []
    shaped = [
        Sample(rollout.prompt.tokens, rollout.tokens, reward, advantage, rollout.logprobs, rollout.key, rollout.carried)
        for (rollout, reward), advantage in zip(known, advantages.advantage_rule(config)(rewards), strict=True)
        if rollout.tokens
    ]
    if config.keep != "pair":
        return shaped
    generator = random.Random(f"{seed} {known[0][0].slot}")
    correct = [sample for sample in shaped if sample.reward > 0]
    incorrect = [sample for sample in shaped if sample.reward < 0]
    if not (correct and incorrect):  # no rollout of one side has tokens
        return []
    return [generator.choice(correct), generator.choice(incorrect)]


def counts(selected: Sequence[Sample]) -> Counts:
    """Return the denominators of the losses; every rank knows the length of all samples, so none is communicated."""
    lengths = {True: 0, False: 0}
    for sample in selected:
        lengths[sample.reward > 0] += len(sample.response_tokens)
    return Counts(len(selected), lengths[True] + lengths[False], lengths[True], lengths[False])


def summary(
    rollouts: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Verdict]], selected: Sequence[Sample]
) -> dict[str, float]:
    """Return metrics of a step's rollouts: pass rate, unknowns, lengths, truncation, penalties, selected samples.

    Means over nothing are absent: those of rewards where no verdict is known.
    """
    outcomes = [verdict.outcome for row in verdicts for verdict in row]
    flat = [rollout for row in rollouts for rollout in row]
    known = [reward_of(verdict) for row in verdicts for verdict in row if verdict.outcome in REWARD]
    lengths = [len(rollout.tokens) for rollout in flat]
    sums = {"reward/mean": sum(known), "reward/pass_rate": sum(reward > 0 for reward in known)}
    return {
        **{name: value / len(known) for name, value in sums.items() if known},
        "reward/solvable_prompts": sum(any(v.outcome is Outcome.CORRECT for v in row) for row in verdicts),
        "verify/unknown": outcomes.count(Outcome.UNKNOWN),
        "verify/seconds_sum": sum(verdict.seconds for row in verdicts for verdict in row),
        "rollout/count": len(flat),
        "rollout/response_tokens_mean": sum(lengths) / max(len(lengths), 1),
        "rollout/response_tokens_max": max(lengths, default=0),
        "rollout/truncated_share": sum(not rollout.finished for rollout in flat) / max(len(flat), 1),
        **{f"penalty/{kind}": sum(v.penalty == kind for row in verdicts for v in row) for kind in KINDS},
        "batch/samples": len(selected),
        "batch/mixed_prompts": sum(
            {Outcome.CORRECT, Outcome.INCORRECT} <= {verdict.outcome for verdict in row} for row in verdicts
        ),
    }

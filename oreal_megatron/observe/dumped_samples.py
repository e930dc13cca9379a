"""Dumped samples with the reward model's view of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.dumps import Dump, DumpShare, read_dump


@dataclass(frozen=True)
class WeighedResponse:
    """Response tokens of one sample, with their weights and scores."""

    slot: int
    index: int
    correct: bool
    tokens: list[int]
    weights: list[float]
    scores: list[float]


def newest_responses(run: Path) -> tuple[int, list[WeighedResponse]]:
    """Return the newest dumped step with scores, and its responses. Raises ConfigError if there is none."""
    for folder in sorted((run / "dumps").glob("step_*"), reverse=True):
        dump = read_dump(folder)
        if responses := responses_of(dump):
            return dump.step, responses
    raise ConfigError(f"{run} has no dump with token scores in {run}/dumps: no step had samples for a reward model")


def responses_of(dump: Dump) -> list[WeighedResponse]:
    """Return the responses of all shares of a dump; none if it has no scores."""
    shares = (dump.share(rank, dump.shares) for rank in range(dump.shares))
    return [response for share in shares for response in _responses_of_share(share)]


def _responses_of_share(share: DumpShare) -> list[WeighedResponse]:
    weights, scores = share.token_weights.values, share.token_weights.scores
    responses = []
    for part, weight_T, score_T in zip(share.batch.micro_batches, weights, scores, strict=False):
        bounds = pairwise(part.action_offsets.tolist())
        rows = zip(part.rollouts.tolist(), part.reward.tolist(), bounds, strict=True)
        for (slot, index), reward, (start, stop) in rows:
            if reward and stop > start:
                values = (values_T[start:stop].tolist() for values_T in (part.labels, weight_T, score_T))
                responses.append(WeighedResponse(slot, index, reward > 0, *values))
    return responses


def choose_pair(responses: list[WeighedResponse]) -> tuple[WeighedResponse, WeighedResponse]:
    """Return an incorrect and a correct response of one prompt: that with the largest weight in an incorrect one."""
    correct = {response.slot: response for response in reversed(responses) if response.correct}
    incorrect = [response for response in responses if not response.correct and response.slot in correct]
    if not incorrect:
        raise ConfigError("the newest dump with token scores has no prompt with a correct and an incorrect response")
    shown = max(incorrect, key=lambda response: max(response.weights))
    return shown, correct[shown.slot]

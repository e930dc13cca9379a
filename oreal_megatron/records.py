"""Records that flow through a training step: frozen data classes with shapes on every field.

Shape letters of the whole project: P prompts, K rollouts per prompt, N samples of a step, B sequences of a micro-batch,
S its tokens, T its action tokens, V vocabulary, H hidden size. A name ending in _T is a tensor [T].
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Outcome(enum.Enum):
    """Result of verifying one rollout. UNKNOWN is not INCORRECT: it never becomes a reward."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of one rollout and the method that decided it."""

    outcome: Outcome
    method: str  # "exact", "numeric", "symbolic", "judge", "truncated", "no answer", "time-out", "error"
    extracted: str | None = None  # answer found in the response
    seconds: float = 0.0  # time spent on this rollout
    reason: str = ""  # of an UNKNOWN: what failed
    penalty: str = ""  # pattern that the response is penalised for (algo/response_penalties.py)
    reward: float | None = None  # from verify.function, with the sign of the outcome; None: +1 or -1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem with its gold answer, as read from the JSONL file."""

    id: int  # line of the file, from 0
    question: str
    gold: str
    pass_rate: float | None  # share of correct rollouts of the starting policy, in [0, 1]
    tokens: tuple[int, ...]  # rendered chat template
    row: str = ""  # JSON of the line of the data file, all fields; only where verify.function reads it


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response with its prompt.

    Tokens, text and log-probs are on the ranks of the replica that generated it; others have stand-ins of known length
    (runtime/remote_values.py).
    """

    prompt: Prompt
    slot: int  # position of its prompt in the step, 0 .. P-1, or in the pool (a prompt may appear twice)
    index: int  # 0 .. K-1 among the rollouts of its prompt
    tokens: tuple[int, ...]  # sampled tokens, including the stop token if there is one
    text: str
    finished: bool  # ended with a stop token; False: truncated
    logprobs: tuple[float, ...] | None = None  # the engine's, at sampling.temperature and without top_p, if requested
    version: int = 0  # newest version of the policy that generated it: updates taken so far
    versions: tuple[tuple[int, int], ...] = ()  # (version, tokens) in order, where several wrote it
    carried: int = 0  # first tokens, written by earlier versions than the one that is trained

    @property
    def oldest_version(self) -> int:
        """Version of the policy that wrote the first token."""
        return self.versions[0][0] if self.versions else self.version

    @property
    def key(self) -> tuple[int, int]:
        """Position of the rollout in the step: (slot, index)."""
        return self.slot, self.index

    def replica(self, replicas: int) -> int:
        """Return the replica that generates it: each has some of every prompt, whose lengths resemble each other.

        Rollout 0 of a prompt belongs to replica slot % replicas. A rollout that grows in rounds stays with its replica,
        which has its keys and values in the prefix cache.
        """
        return (self.slot + self.index) % replicas


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout chosen for training, with its reward and advantage."""

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    reward: float  # +1 or -1
    advantage: float
    engine_logprobs: tuple[float, ...] | None = None  # one per response token, if requested
    # Slot and index of its rollout in the step; line and turn of a demonstration, from 1 and 0; -1: of neither.
    rollout: tuple[int, int] = (-1, -1)
    carried: int = 0  # first response tokens, written by earlier versions of the policy

    def __len__(self) -> int:
        """Return the tokens of prompt and response."""
        return len(self.prompt_tokens) + len(self.response_tokens)


@dataclass(frozen=True, slots=True)
class Counts:
    """Denominators of the losses, over all samples of the step on all data-parallel ranks."""

    sequences: int
    action_tokens: int
    correct_tokens: int
    incorrect_tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences, and their packed action tokens."""

    tokens: torch.Tensor  # [S] int64, prompt then response of each sequence, then padding
    positions: torch.Tensor  # [S] int64, from 0 in every sequence
    sequence_offsets: tuple[int, ...]  # cumulative lengths within S; padding counts as one more sequence
    action_index: torch.Tensor  # [T] int64, the row of S that predicts each action token
    labels: torch.Tensor  # [T] int64, the action tokens
    action_offsets: torch.Tensor  # [B+1] int64, cumulative action tokens of the sequences, within T
    reward: torch.Tensor  # [B] float32, +1 or -1; 0 marks the padding of an empty micro-batch
    advantage: torch.Tensor  # [B] float32
    engine_logprobs: torch.Tensor  # [T] float32, nan where the engine returned none
    rollouts: torch.Tensor  # [B, 2] int64, Sample.rollout of each sequence
    carried: torch.Tensor  # [T] bool, tokens that earlier versions of the policy wrote

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the micro-batch with its tensors on a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return MicroBatch(**values | moved)


@dataclass(frozen=True, slots=True)
class ActionTokens:
    """Values of a micro-batch's action tokens that a loss term reads beside log-probs; [T] each, without gradient."""

    reward: torch.Tensor  # of the token's response
    advantage: torch.Tensor  # likewise
    weight: torch.Tensor  # token weight
    reference_logp: torch.Tensor  # log-prob of the reference, nats
    old_logp: torch.Tensor  # log-prob of the policy before the step's first update, nats
    engine_logp: torch.Tensor  # log-prob of the engine, nats; nan where it returned none
    sequence: torch.Tensor  # int64, number of the token's response in the micro-batch
    length: torch.Tensor  # int64, tokens of that response


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """Outcome of one rollout, and the reward model's belief in it."""

    slot: int
    index: int
    correct: bool
    score: float  # mean of the token scores, the logit of the belief that the rollout is correct


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights of the action tokens in the policy's loss, from the reward model as it was before its own update."""

    values: list[torch.Tensor]  # [T] per micro-batch; empty before the last pipeline stage and where not valid
    valid: bool = True  # False: the guard skipped the reward model's step (algo/guard.py), so the policy skips it too
    scores: list[torch.Tensor] = field(default_factory=list)  # [T] as `values`; empty without a reward model too
    rollouts: tuple[ScoredRollout, ...] = ()  # of the step on all ranks, equal on each; empty as `scores` is


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """Parameters of packing samples into micro-batches (algo/packing.py); equal on all ranks except for `rank`."""

    tokens_per_micro_batch: int
    rank: int = 0  # data-parallel rank
    ranks: int = 1  # data-parallel ranks
    micro_batch_multiple: int = 1  # interleaved pipelines need a multiple of their stages
    token_multiple: int = 1  # sequence and context parallelism share the tokens of a micro-batch evenly
    even_tokens: float = math.inf  # sequence length at which attention costs as much as the matrix products


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Part of a step's prompts that an update of the policy trains on: consecutive micro-batches of each rank."""

    micro_batches: int  # number of them, equal on all ranks
    counts: Counts  # denominators of the update, over the samples of this part on all data-parallel ranks


@dataclass(frozen=True, slots=True)
class Batch:
    """One data-parallel rank's micro-batches of a step, with the counts of the whole step."""

    micro_batches: tuple[MicroBatch, ...]
    counts: Counts
    mini_batches: tuple[MiniBatch, ...] = ()  # in the order of the policy's updates; empty: the whole step is one

    def split(self) -> list[tuple[slice, Batch]]:
        """Return each mini-batch as a batch of its own, with its range of the micro-batches."""
        parts = self.mini_batches or (MiniBatch(len(self.micro_batches), self.counts),)
        ranges = consecutive([part.micro_batches for part in parts])
        return [(own, Batch(self.micro_batches[own], part.counts)) for own, part in zip(ranges, parts, strict=True)]


def consecutive(sizes: Sequence[int]) -> list[slice]:
    """Return the ranges of consecutive parts of a sequence, given their sizes."""
    return [slice(stop - size, stop) for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]

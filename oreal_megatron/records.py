"""What flows through the trainer: frozen records, shapes on every field.

Shape letters used in the whole project: P prompts, K answers per prompt, N samples kept, B sequences of a
micro-batch, S all its tokens, T its action tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass

import torch


class Outcome(enum.Enum):
    """What the verifier says of one answer. UNKNOWN is not wrong: it never becomes a reward."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of one answer and how it was reached."""

    outcome: Outcome
    method: str  # "exact", "numeric", "symbolic", "judge", "truncated", "no answer", "time-out", "error"
    extracted: str | None = None  # the answer found in the response
    seconds: float = 0.0  # time spent on this answer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its gold answer, as read from the JSONL file."""

    id: int  # line of the file, from 0
    question: str
    gold: str
    pass_rate: float | None  # share of the starting policy's answers that were right, in [0, 1]
    tokens: tuple[int, ...]  # the rendered chat template


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer."""

    prompt: Prompt
    slot: int  # 0 .. P-1, place of its prompt in the step (one prompt may be asked twice)
    index: int  # 0 .. K-1 among the answers of its prompt
    tokens: tuple[int, ...]  # sampled tokens, the stop token included when there is one
    text: str
    finished: bool  # ended with the stop token; False means truncated
    logprobs: tuple[float, ...] | None = None  # the engine's untempered log-probs, where they were asked for
    version: int = 0  # of the policy that the engine held when it was asked

    @property
    def key(self) -> tuple[int, int]:
        return self.slot, self.index


@dataclass(frozen=True, slots=True)
class Sample:
    """One kept answer with its reward and leave-one-out advantage."""

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    reward: float  # +1 or -1
    advantage: float
    engine_logprobs: tuple[float, ...] | None = None  # one for each response token, where the engine was asked

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)


@dataclass(frozen=True, slots=True)
class Counts:
    """Denominators of the losses, over all kept samples of the step and all data-parallel ranks."""

    sequences: int
    action_tokens: int
    correct_tokens: int
    incorrect_tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end, and their action tokens laid end to end."""

    tokens: torch.Tensor  # [S] int64, prompt then response of each sequence, then filler
    positions: torch.Tensor  # [S] int64, from 0 in every sequence
    sequence_offsets: tuple[int, ...]  # cumulative lengths within S; padding counts as one more sequence
    action_index: torch.Tensor  # [T] int64, the row of S that predicts each action token
    labels: torch.Tensor  # [T] int64, the action tokens
    action_offsets: torch.Tensor  # [B+1] int64, cumulative action tokens of the sequences, within T
    reward: torch.Tensor  # [B] float32, +1 or -1; 0 marks the filler of an empty micro-batch
    advantage: torch.Tensor  # [B] float32
    engine_logprobs: torch.Tensor  # [T] float32, nan where the engine was not asked

    def to(self, device: torch.device | str) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        )


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights of the action tokens in the policy's loss, from the reward model as it was before its own update."""

    values: list[torch.Tensor]  # [T] per micro-batch; empty before the last pipeline stage and where not valid
    valid: bool = True  # False: the guard skipped the reward model's step (algo/guard.py), so the policy skips it too


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """How a step's samples are packed into micro-batches (algo/packing.py); the same on all ranks but for `rank`."""

    tokens_per_micro_batch: int
    rank: int = 0  # data-parallel rank
    ranks: int = 1  # data-parallel ranks
    micro_batch_multiple: int = 1  # interleaved pipelines need a multiple of their stages
    token_multiple: int = 1  # sequence and context parallelism share the tokens of a micro-batch evenly
    even_tokens: float = math.inf  # sequence length at which attention costs as much as the matrix products


@dataclass(frozen=True, slots=True)
class Batch:
    """One data-parallel rank's micro-batches of a step, with the counts of the whole step."""

    micro_batches: tuple[MicroBatch, ...]
    counts: Counts

"""Token weights of the checked task from its true errors, for `weights.rule`: an upper bound for a reward model."""

from __future__ import annotations

from functools import lru_cache

import checked_steps
import torch
from small_model import make_tokenizer
from torch import Tensor

from oreal_megatron.config import Config
from oreal_megatron.records import MicroBatch


def first_error(score_T: Tensor, micro_batch: MicroBatch, config: Config) -> Tensor:
    """Return 1 for the tokens of correct responses, and in an incorrect one for the digit of its first wrong step only.

    An incorrect response without a wrong step (its box is wrong, or missing) has weight 1 everywhere.
    """
    weight_T = torch.ones_like(score_T)
    actions = micro_batch.action_offsets.tolist()
    for number, (start, stop) in enumerate(zip(actions[:-1], actions[1:], strict=True)):
        if micro_batch.reward[number] >= 0:
            continue
        first = micro_batch.sequence_offsets[number]
        prompt = micro_batch.tokens[first : micro_batch.sequence_offsets[number + 1] - (stop - start)]
        question = _characters(prompt)[1:-1]  # between <|user|> and <|assistant|>
        position = checked_steps.first_wrong_step(question, _characters(micro_batch.labels[start:stop]))
        if position is not None:
            weight_T[start:stop] = 0
            weight_T[start + position] = 1
    return weight_T


def _characters(tokens: Tensor) -> str:
    """Return one character per token: `?` for special tokens, and for the numbers above the vocabulary."""
    return "".join(_vocabulary().get(token, "?") for token in tokens.tolist())


@lru_cache
def _vocabulary() -> dict[int, str]:
    """Return the characters by their token."""
    return {token: name for name, token in make_tokenizer().get_vocab().items() if len(name) == 1}

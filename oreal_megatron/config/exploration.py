"""Sections of T1 (arXiv 2501.11651) beside the paper's: penalties of responses, and a reference that moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from oreal_megatron.config.schema import FixedKey, Key, Section


@dataclass(frozen=True)
class PenaltyConfig(Section):
    """Responses with an unwanted pattern, which get a reward of their own whatever their answer is."""

    repetition: Annotated[bool, Key("penalise responses that repeat n-grams of tokens")] = False
    overlong: Annotated[bool, Key("penalise responses that were cut off at their longest length")] = False
    gibberish: Annotated[bool, Key("penalise responses with foreign scripts or broken characters")] = False
    reward: Annotated[
        float, Key("reward of a penalised response; a correct one has 1, an incorrect one -1", -100.0, -1.0)
    ] = -3.0
    ngram_tokens: Annotated[int, Key("length n of the n-grams", 2, 1024, "tokens")] = 32
    ngram_repeats: Annotated[
        int, Key("occurrences of one n-gram, without overlap, that are a repetition", 2, 10000)
    ] = 8  # fmt: skip
    ngram_share: Annotated[
        float, Key("share of a response's n-grams, equal to an earlier one, that is a repetition", 0.01, 1.0)
    ] = 0.5
    foreign_share: Annotated[
        float,
        Key("share of letters in scripts other than Latin, Greek and the question's that is gibberish", 0.001, 1.0),
    ] = 0.01
    broken_characters: Annotated[
        int, Key("replacement, control and private characters, and misread UTF-8, that are gibberish", low=1)
    ] = 3

    perplexity: Annotated[
        float, Key("perplexity under the reference above which a response is penalised; 0: no limit", 0.0, 1e9)
    ] = 0.0

    @property
    def enabled(self) -> bool:
        """True if any pattern is penalised."""
        return self.repetition or self.overlong or self.gibberish or self.perplexity > 0

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message about a limit that every response exceeds."""
        if 0 < self.perplexity <= 1:
            yield f"{path}perplexity is {self.perplexity:g}, but every text has at least 1; set it to 0 or above 1"


@dataclass(frozen=True)
class ReferenceConfig(Section):
    """The reference policy of the KL divergence: fixed, or following the policy."""

    decay: Annotated[
        float,
        FixedKey("a of reference <- a reference + (1 - a) policy; 1: a fixed one, 0: a copy of the policy", 0.0, 1.0),
    ] = 1.0
    every: Annotated[int, Key("updates of the policy between two of the reference, for decay below 1", low=1)] = 1

    @property
    def moves(self) -> bool:
        """True if the reference follows the policy."""
        return self.decay < 1.0

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message about a distance between two moves of a reference that is fixed."""
        if self.every > 1 and not self.moves:
            yield (
                f"{path}every is {self.every}, but {path}decay is 1, so that the reference never moves; set "
                f"{path}decay below 1 (0 copies the policy)"
            )

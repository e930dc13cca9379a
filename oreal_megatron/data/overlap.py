"""Overlap of texts: equal but for spaces and punctuation, or 13 consecutive words in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OVERLAP_WORDS = 13  # consecutive words that two texts do not share by chance (Brown et al. 2020)
Words = tuple[str, ...]


class TextIndex:
    """Texts that others are compared with."""

    def __init__(self, texts: Iterable[str]):
        self.texts: set[str] = set()
        self.grams: set[Words] = set()
        for text in texts:
            self.texts.add(plain_form(text))
            self.grams |= _grams(_words(text))

    def overlaps(self, text: str) -> bool:
        """Return whether a text is equal to one of the index, or shares OVERLAP_WORDS consecutive words with it."""
        return plain_form(text) in self.texts or not self.grams.isdisjoint(_grams(_words(text)))


def find_overlap(problems: Sequence[str], training: Iterable[str]) -> list[int]:
    """Return the problems that overlap with a training prompt."""
    index = TextIndex(training)
    return [number for number, text in enumerate(problems) if index.overlaps(text)]


def plain_form(text: str) -> str:
    """Return a text without spaces, dollar signs, punctuation of sentences and case; operators stay."""
    return re.sub(r"[\s$.,;:?!]", "", text.lower())


def _words(text: str) -> Words:
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def _grams(words: Words) -> set[Words]:
    return {words[start : start + OVERLAP_WORDS] for start in range(len(words) - OVERLAP_WORDS + 1)}

"""Patterns of a response that T1 penalises (arXiv 2501.11651): repetition, overlong, gibberish, high perplexity.

Pure functions; the thresholds are settings (selection.penalties). tools/penalty_rates.py measures how
many correct solutions they hit and how many degenerate responses they miss.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from oreal_megatron.config import PenaltyConfig
from oreal_megatron.records import Rollout

KINDS = ("gibberish", "repetition", "overlong", "perplexity")  # in the order in which they are tried
# First words of the Unicode names of letters, and the script that each belongs to.
SCRIPTS = {
    "CYRILLIC": "Cyrillic", "CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul",
    "ARABIC": "Arabic", "HEBREW": "Hebrew", "THAI": "Thai", "DEVANAGARI": "Devanagari", "BENGALI": "Bengali",
    "GURMUKHI": "Gurmukhi", "GUJARATI": "Gujarati", "ORIYA": "Oriya", "TAMIL": "Tamil", "TELUGU": "Telugu",
    "KANNADA": "Kannada", "MALAYALAM": "Malayalam", "SINHALA": "Sinhala", "LAO": "Lao", "TIBETAN": "Tibetan",
    "MYANMAR": "Myanmar", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian", "ETHIOPIC": "Ethiopic", "KHMER": "Khmer",
    "MONGOLIAN": "Mongolian", "SYRIAC": "Syriac", "THAANA": "Thaana", "BOPOMOFO": "Bopomofo",
}  # fmt: skip
TOGETHER = frozenset({"Han", "Kana", "Hangul", "Bopomofo"})  # scripts that one text may mix
FOREIGN_LETTERS = 5  # fewer are a name or a quotation
# UTF-8 that was read as Latin-1 or Windows-1252, such as the three characters of an apostrophe.
MOJIBAKE = re.compile("\u00e2\u20ac[\u0080-\u00bf\u0152-\u2122]|\u00c3[\u0080-\u00bf\u2018-\u2122]|\u00ef\u00bf\u00bd")
# Control, private, half of a character. Unassigned ones depend on Python's version: new emoji are among them.
BROKEN_CATEGORIES = frozenset({"Cc", "Co", "Cs"})
NOT_ASCII = re.compile(r"[^\t\n\r\x20-\x7e]")
HASH_BASE = 0x5851F42D4C957F2D  # odd: multiplication is invertible modulo 2^64


def find_penalty(rollout: Rollout, config: PenaltyConfig) -> str:
    """Return the first of KINDS but perplexity that a rollout is to be penalised for; "" if there is none."""
    if config.gibberish and is_gibberish(rollout.text, rollout.prompt.question, config):
        return "gibberish"
    if config.repetition and is_repetitive(rollout.tokens, config):
        return "repetition"
    return "overlong" if config.overlong and not rollout.finished else ""


def is_improbable(logp_sum: float, tokens: int, limit: float) -> bool:
    """Return whether exp(-mean log-prob), the perplexity of a response, is above a limit."""
    return -logp_sum / tokens > math.log(limit)


def is_repetitive(tokens: tuple[int, ...], config: PenaltyConfig) -> bool:
    """Return whether many n-grams of a response occurred before, or one of them occurs again and again."""
    size = config.ngram_tokens
    if len(tokens) < 2 * size:
        return False
    hashes = _ngram_hashes(torch.tensor(tokens), size)
    different, number, count = hashes.unique(return_inverse=True, return_counts=True)
    if 1 - len(different) / len(hashes) >= config.ngram_share:
        return True
    frequent = torch.nonzero(count >= config.ngram_repeats)[:, 0]
    return any(
        _count_without_overlap(torch.nonzero(number == ngram)[:, 0], size) >= config.ngram_repeats for ngram in frequent
    )


def _ngram_hashes(tokens: Tensor, size: int) -> Tensor:
    """Return a hash of the n-gram at each position, a polynomial of its tokens modulo 2^64."""
    positions = len(tokens) - size + 1
    hashes = torch.zeros(positions, dtype=torch.int64)
    for offset in range(size):
        hashes = hashes * HASH_BASE + tokens[offset : offset + positions] + 1
    return hashes


def _count_without_overlap(positions: Tensor, size: int) -> int:
    """Return how many of the rising positions an n-gram can have without overlapping itself, taken from the left."""
    count, free_from = 0, 0
    for position in positions.tolist():
        if position >= free_from:
            count, free_from = count + 1, position + size
    return count


def is_gibberish(text: str, question: str, config: PenaltyConfig) -> bool:
    """Return whether a response has broken characters, or letters of scripts that its question does not use."""
    unusual = Counter(NOT_ASCII.findall(text))
    broken = sum(count for character, count in unusual.items() if _is_broken(character))
    if broken + len(MOJIBAKE.findall(text)) >= config.broken_characters:
        return True
    expected = _scripts(question)
    if expected & TOGETHER:
        expected |= TOGETHER
    foreign = sum(count for character, count in unusual.items() if _script(character) not in expected | {""})
    if foreign < FOREIGN_LETTERS:
        return False
    return foreign >= config.foreign_share * sum(map(str.isalpha, text))


def _scripts(characters: Iterable[str]) -> set[str]:
    return {_script(character) for character in set(characters)} - {""}


@lru_cache(maxsize=2**16)
def _script(character: str) -> str:
    """Return the script of a letter; "" for Latin, Greek, mathematical letters, and what is no letter."""
    if character.isascii() or not character.isalpha():
        return ""
    return SCRIPTS.get(unicodedata.name(character, "").split(" ")[0].split("-")[0], "")


@lru_cache(maxsize=2**16)
def _is_broken(character: str) -> bool:
    return character == "\ufffd" or unicodedata.category(character) in BROKEN_CATEGORIES

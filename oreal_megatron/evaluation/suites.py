"""The benchmarks of the paper: where their problems come from, what the paper reached, and what training has seen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oreal_megatron.config import ConfigError
from oreal_megatron.data import problems


@dataclass(frozen=True)
class Suite:
    """A JSONL file of problems; `part` keeps those with one value of a field. `hub`: where the suite itself lies."""

    title: str
    file: str
    part: tuple[str, str] | None = None
    hub: str = ""


SUITES = {
    "math500": Suite("MATH-500", "math500.jsonl", hub="hub:HuggingFaceH4/MATH-500:test.jsonl"),
    "aime24": Suite("AIME 2024", "aime2024.jsonl"),
    "aime25-1": Suite("AIME 2025 I", "aime2025.jsonl", ("part", "I"), "hub:opencompass/AIME2025:aime2025-I.jsonl"),
    "livemath": Suite("LiveMathBench", "livemathbench.jsonl"),
    "olympiad": Suite("OlympiadBench", "olympiadbench_math_en.jsonl"),
    "aime25": Suite("AIME 2025", "aime2025.jsonl", hub="hub:math-ai/aime25:test.jsonl"),
    "amc23": Suite("AMC 2023", "amc23.jsonl"),
    "gsm8k": Suite("GSM8K", "gsm8k_test.jsonl"),
}
# The paper's Table 1: pass@1, greedy, percent; None where it gives none. Starred in the paper: copied from reports.
PAPER_SUITES = ("math500", "aime24", "aime25-1", "livemath", "olympiad")
PAPER = {
    "Qwen2.5-7B-Instruct": (76.6, 13.3, 0.0, 37.0, 29.1),
    "Qwen2.5-Math-7B-Instruct": (81.8, 20.0, 13.3, 44.1, 31.1),
    "DeepSeek-R1-Distill-Qwen-7B": (92.8, 55.5, 40.0, 65.6, 64.1),
    "OREAL-7B": (91.0, 33.3, 33.3, 62.6, 59.9),
    "OREAL-DSR1-Distill-Qwen-7B": (94.0, 50.0, 40.0, 65.6, 66.1),
    "QwQ-32B-Preview": (90.6, 50.0, 40.0, 72.7, 58.5),
    "DeepSeek-R1-Distill-Qwen-32B": (94.3, 72.6, 46.7, 67.7, 71.2),
    "OREAL-32B": (95.0, 60.0, 46.7, 74.8, 72.4),
    "o1-preview": (85.5, 44.6, 40.0, 71.0, 43.6),
    "o1-mini": (90.0, 56.6, 46.7, 74.4, 46.3),
}
GRAM = 13  # words in a row that two texts do not share by chance (Brown et al. 2020)


def find(name: str, folder: Path) -> tuple[Suite, str]:
    """The suite of a name and its file in `folder`; a path to a JSONL file is a suite of its own.

    `hub:OWNER/DATASET:FILE.jsonl` is fetched from the Hugging Face hub.
    """
    suite = named(name)
    if name.startswith("hub:"):
        return suite, _fetched(name)
    if name.endswith(".jsonl"):
        return suite, name
    path = folder / suite.file
    if path.is_file():
        return suite, str(path)
    if not suite.hub:
        raise ConfigError(
            f"suite {name}: {path} does not exist; put its problems there, or name their folder with --data"
        )
    return dataclasses.replace(suite, part=None), _fetched(suite.hub)


def named(name: str) -> Suite:
    """The suite of a name, wherever its problems are."""
    if name.startswith("hub:"):
        return Suite(name, name)
    if name.endswith(".jsonl"):
        return Suite(Path(name).stem, name)
    if name not in SUITES:
        raise ConfigError(
            f"there is no suite {name!r}; known are {', '.join(SUITES)}, a path to a JSONL file with question and "
            "answer, and hub:OWNER/DATASET:FILE.jsonl"
        )
    return SUITES[name]


def _fetched(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        _, repository, file = name.split(":")
        return hf_hub_download(repository, file, repo_type="dataset")
    except ValueError:
        raise ConfigError(f"{name}: wanted hub:OWNER/DATASET:FILE.jsonl") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{name} could not be fetched: {error}") from None


def kept(suite: Suite, path: str) -> set[int]:
    """The numbers of the problems that belong to the suite, from 0."""
    lines = enumerate(problems.read_problems(path))
    return {number for number, line in lines if suite.part is None or line.get(suite.part[0]) == suite.part[1]}


def seen(problems: Sequence[str], training: Sequence[str]) -> list[int]:
    """Numbers of the problems that training has seen: the same words, or GRAM of them in a row."""
    known, grams = set(), set()
    for text in training:
        words = _words(text)
        known.add(words)
        grams |= _grams(words)
    return [n for n, text in enumerate(problems) if _words(text) in known or _grams(_words(text)) & grams]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def _grams(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[start : start + GRAM] for start in range(len(words) - GRAM + 1)}

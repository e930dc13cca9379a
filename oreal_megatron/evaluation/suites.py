"""Benchmarks: files of their problems, results in the paper, and overlap with training prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oreal_megatron.config import ConfigError
from oreal_megatron.data import lines, problems
from oreal_megatron.data.user_functions import Reader


@dataclass(frozen=True)
class Suite:
    """A JSONL file of problems. `part`: (field, value) of those in the suite; `hub`: location of the suite alone."""

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
# arXiv 2502.06781, Table 1: pass@1, greedy, percent; those starred there are copied from other reports.
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
FILE_ENDINGS = (".jsonl", ".parquet")


def find(name: str, folder: Path) -> tuple[Suite, str]:
    """Return the suite of a name and its file in `folder`; a path to a data file is a suite of its own.

    `hub:OWNER/DATASET:FILE.jsonl` is downloaded from the Hugging Face hub.
    """
    suite = named(name)
    if name.startswith(lines.HUB) or name.endswith(FILE_ENDINGS):
        return suite, str(lines.local_file(name))
    path = folder / suite.file
    if path.is_file():
        return suite, str(path)
    if not suite.hub:
        raise ConfigError(
            f"suite {name}: {path} does not exist; put its problems there, or set their folder with --data"
        )
    return dataclasses.replace(suite, part=None), str(lines.local_file(suite.hub))


def of_reader(path: str) -> tuple[Suite, str]:
    """Return the suite of a path that `data.reader` reads, which need not be a file."""
    return Suite(Path(path).name, path), path


def named(name: str) -> Suite:
    """Return the suite of a name, without its file."""
    if name.startswith(lines.HUB):
        return Suite(name, name)
    if name.endswith(FILE_ENDINGS):
        return Suite(Path(name).stem, name)
    if name not in SUITES:
        raise ConfigError(
            f"there is no suite {name!r}; choose one of {', '.join(SUITES)}, a path to a .jsonl or .parquet file with "
            "question and answer, and hub:OWNER/DATASET:FILE.jsonl"
        )
    return SUITES[name]


def problem_numbers(
    suite: Suite,
    path: str,
    keys: Mapping[str, str] = problems.NO_KEYS,
    free_golds: bool = False,
    reader: Reader | None = None,
) -> set[int]:
    """Return the problems of the file that belong to the suite, from 0; `free_golds`: a function of the user grades."""
    numbered = enumerate(problems.read_problems(path, keys, free_golds, reader))
    return {number for number, line in numbered if suite.part is None or line.get(suite.part[0]) == suite.part[1]}

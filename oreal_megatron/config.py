"""One tree of frozen dataclasses. Recipes are Python functions that build it; derived numbers are properties."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Bad input found before anything was loaded; the message is a sentence for the user (exit code 2)."""


@dataclass(frozen=True)
class Judge:
    """LLM judge behind an OpenAI-compatible API, asked where the rules say WRONG. No URL: no judge."""

    urls: tuple[str, ...] = ()
    model: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    retries: int = 3
    concurrency: int = 64  # requests under way at once, all hosts together
    all_down_wait_s: float = 600.0  # how long a step waits when every host is down before the run stops
    max_answer_chars: int = 500  # of the extracted answer shown to the judge
    cache: str = ""  # verdict cache file that survives a restart; empty: memory only


@dataclass(frozen=True)
class Verify:
    """How answers are graded."""

    workers: int = 2  # grading processes of each rank that holds rollouts
    timeout_s: float = 2.0  # per answer, enforced by killing the worker
    memory_mb: int = 1024  # per worker
    thinking_end: tuple[str, ...] = ("</think>",)  # the answer is looked for after the last of these
    unknown_limit: float = 0.2  # the run stops when a larger share of a step's verdicts is UNKNOWN
    judge: Judge = field(default_factory=Judge)

"""`oreal data rft`: demonstrations from correct rollouts (rejection-sampling fine-tuning), so many for each problem."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oreal_megatron.config import ConfigError
from oreal_megatron.data import labelled_rollouts
from oreal_megatron.data.decisions import describe_counts
from oreal_megatron.data.lines import Line, write_lines
from oreal_megatron.records import Outcome

NOT_CORRECT = "not verified as correct"
UNFINISHED = "cut off"
PENALISED = "penalised"
REPEATED = "the same response again"
SURPLUS = "more than so many for its problem"
REASONS = (NOT_CORRECT, UNFINISHED, PENALISED, REPEATED, SURPLUS)
Ranked = tuple[int, str, str]  # rank, digest that breaks ties, response


@dataclass(frozen=True)
class DemonstrationChoice:
    """Settings of the choice."""

    order: Literal["shortest", "random"] = "shortest"
    per_problem: int = 1
    seed: int = 0


def write_demonstrations(
    sources: Sequence[str], output: Path, choice: DemonstrationChoice
) -> tuple[Counter[str], int, int]:
    """Write `question`, `response` lines; return lines by reason, problems with and without a demonstration.

    The choice does not depend on the order of lines and files. Memory holds the chosen responses only.
    """
    if output.exists() and any(output.samefile(path) for path in _paths(sources)):
        raise ConfigError(f"{output} is one of the inputs; give another name")
    chosen: dict[str, list[Ranked]] = {}
    counts: Counter[str] = Counter()
    for name, line in _lines(sources):
        labelled_rollouts.check_rollout(name, line)
        best = chosen.setdefault(line["question"], [])
        counts[_reason(line) or _insert(best, _rank(line, choice), choice.per_problem)] += 1
    if not any(chosen.values()):
        raise ConfigError(
            f"none of the {sum(counts.values())} rollouts is a demonstration ({describe_counts(counts)}); expected "
            "complete responses that were verified as correct: sample more per problem "
            "(sampling.rollouts_per_prompt), take easier problems, or raise sampling.max_new_tokens if they are cut off"
        )
    write_lines(output, _demonstrations(chosen))
    return counts, sum(map(bool, chosen.values())), sum(not best for best in chosen.values())


def _reason(line: Line) -> str:
    """Return why a rollout is no demonstration, "" if it could be one."""
    if line["verdict"] != Outcome.CORRECT.value:
        return NOT_CORRECT
    if not line.get("finished", True):
        return UNFINISHED
    return PENALISED if line.get("penalty") else ""


def _rank(line: Line, choice: DemonstrationChoice) -> Ranked:
    """Return a response with its rank among those of its problem: the lowest are chosen."""
    text = line["response"]
    digest = hashlib.blake2b(f"{choice.seed} {line['question']} {text}".encode(), digest_size=16).hexdigest()
    length = line.get("tokens", len(text)) if choice.order == "shortest" else 0
    return length, digest, text


def _insert(best: list[Ranked], ranked: Ranked, size: int) -> str:
    """Put a response among the best of its problem; return why a line falls out, "" if none does."""
    if ranked in best:
        return REPEATED
    is_full = len(best) == size
    best[:] = heapq.nsmallest(size, [*best, ranked])
    return SURPLUS if is_full else ""


def _demonstrations(chosen: Mapping[str, Sequence[Ranked]]) -> Iterator[Line]:
    for question, best in chosen.items():
        for _, _, response in best:
            yield {"question": question, "response": response}


def _lines(sources: Sequence[str]) -> Iterator[tuple[str, Line]]:
    for source in sources:
        for lines in labelled_rollouts.lines_by_step(source):
            yield from lines


def _paths(sources: Sequence[str]) -> list[Path]:
    return [path for source in sources for path in labelled_rollouts.files_of(source)]

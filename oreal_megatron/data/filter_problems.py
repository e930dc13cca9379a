"""`oreal data filter`: problems of a file that are readable, new, unseen in test sets, and of the right difficulty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from oreal_megatron.config import ConfigError
from oreal_megatron.data import decisions, key_map, problems
from oreal_megatron.data.lines import Line, local_file, read_lines, write_lines
from oreal_megatron.data.overlap import TextIndex, plain_form
from oreal_megatron.runtime import files

# Reasons for dropping a problem, in the order in which they are checked.
NO_PROBLEM = "no question or gold answer"
DUPLICATE = "duplicate question"
CONTAMINATED = "overlap with a test file"
EASY_OR_HARD = "pass rate outside the limits"
UNRATED = "no pass rate"
UNREADABLE = "unreadable gold answer"
REASONS = (NO_PROBLEM, DUPLICATE, CONTAMINATED, EASY_OR_HARD, UNRATED, UNREADABLE)


@dataclass(frozen=True)
class ProblemFilter:
    """Settings of the filter."""

    min_rate: float = 0.0
    max_rate: float = 1.0  # inclusive; below 1 or with min_rate above 0, problems without pass rate are dropped
    test_files: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)  # as data.keys

    def check(self) -> None:
        """Raise ConfigError for limits that no pass rate meets."""
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ConfigError(
                f"the pass-rate limits are {self.min_rate:g} and {self.max_rate:g}; expected 0 <= low <= high <= 1"
            )

    @property
    def limits_rates(self) -> bool:
        """True if a pass rate can be outside the limits."""
        return self.min_rate > 0 or self.max_rate < 1


def filter_file(
    source: str, output: Path, settings: ProblemFilter, equals_itself: Callable[[str], bool]
) -> Counter[str]:
    """Write the lines that stay, unchanged, and return the number of lines by reason; "" counts those that stay.

    Raises ConfigError if none would stay.

    `equals_itself` says whether the verifier can read a gold answer. A second start continues after the last decision.
    """
    settings.check()
    path = local_file(source)
    if output.exists() and output.samefile(path):
        raise ConfigError(f"{output} is the input itself; give another name")
    seen: set[str] = set()
    tests = TextIndex(_questions(settings))
    header: dict[str, object] = {"input": files.digest([path]), **asdict(settings)}
    header["test_digests"] = [files.digest([local_file(test)]) for test in settings.test_files]
    reasons: dict[int, str] = {}
    with decisions.Decisions(output, header) as journal:
        for number, line in read_lines(source):
            reason = journal.earlier.get(number)
            if reason is None:
                reason = _reason(f"{source} line {number}", line, settings, seen, tests, equals_itself)
                journal.add(number, reason)
            if reason != NO_PROBLEM:
                seen.add(plain_form(_question(source, line, settings)))
            reasons[number] = reason
        if all(reasons.values()):
            journal.remove()
            raise ConfigError(_describe_empty(source, Counter(reasons.values()), settings))
    write_lines(output, (line for number, line in read_lines(source) if not reasons[number]))
    return Counter(reasons.values())


def _reason(
    name: str,
    line: Line,
    settings: ProblemFilter,
    seen: set[str],
    tests: TextIndex,
    equals_itself: Callable[[str], bool],
) -> str:
    """Return why a line is dropped, "" if it is not; the checks that cost most come last."""
    try:
        problem = problems.read_problem(name, line, settings.keys)
    except ConfigError:
        return NO_PROBLEM
    question, rate = problem["question"], problem["pass_rate"]
    if plain_form(question) in seen:
        return DUPLICATE
    if tests.overlaps(question):
        return CONTAMINATED
    if settings.limits_rates and rate is None:
        return UNRATED
    if settings.limits_rates and not settings.min_rate <= rate <= settings.max_rate:
        return EASY_OR_HARD
    return "" if equals_itself(problem["gold_answer"]) else UNREADABLE


def _describe_empty(source: str, counts: Counter[str], settings: ProblemFilter) -> str:
    """Return a message about a filter that drops every line, with the fix for the most frequent reason."""
    others = [reason for reason in REASONS if reason != DUPLICATE]  # the first of duplicates has another reason
    reason = max(others, key=counts.__getitem__)
    if reason == NO_PROBLEM:
        fix = _first_fault(source, settings)
    elif reason == UNRATED:
        fix = "rate them with `oreal evaluate RECIPE --rate OUT.jsonl`, or name their key with --key pass_rate=KEY"
    elif reason == EASY_OR_HARD:
        fix = "widen --min-rate and --max-rate"
    else:
        fix = "give another file"
    return f"none of the {counts.total()} lines of {source} stays ({decisions.describe_counts(counts)}); {fix}"


def _first_fault(source: str, settings: ProblemFilter) -> str:
    """Return the error of the first line that is no problem, as other commands report it, with this one's option."""
    for number, line in read_lines(source):
        try:
            problems.read_problem(f"{source} line {number}", line, settings.keys)
        except ConfigError as error:
            return str(error).replace(key_map.OPTION, "--key ")
    return ""


def _question(name: str, line: Line, settings: ProblemFilter) -> str:
    return str(problems.read_problem(name, line, settings.keys)["question"])


def _questions(settings: ProblemFilter) -> Iterator[str]:
    """Yield the questions of the test files; ConfigError for a line without one."""
    for test in settings.test_files:
        for line in problems.read_problems(test, settings.keys):
            yield line["question"]

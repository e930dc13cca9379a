"""`oreal data merge`: attempts at a problem and critiques of them, merged into one chain (T1, arXiv 2501.11651).

A language model criticises each attempt, told whether its answer is correct, and then writes attempts and critiques as
one train of thought that tries, notices errors, corrects them and checks the result. A chain stays only if the verifier
finds its answer correct.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from oreal_megatron.config import ConfigError
from oreal_megatron.data import labelled_rollouts, replies
from oreal_megatron.data.decisions import describe_counts
from oreal_megatron.data.lines import Line, write_lines
from oreal_megatron.data.replies import Replies, Text
from oreal_megatron.records import Outcome
from oreal_megatron.runtime.chat_client import Chat

NO_CORRECT = "no correct attempt with a known answer"
INCORRECT = "the chain's answer is not verified as correct"
REASONS = (NO_CORRECT, *replies.REASONS, INCORRECT)
CRITIQUE = (
    "You review an attempt to solve a mathematics problem, and are told whether its final answer is correct. If it is "
    "incorrect, name the first step that is wrong, explain why, and say what to do instead, without the final answer. "
    "If it is correct, verify the steps that matter, by another method where there is one. Write a few sentences."
)
MERGE = (
    "You are given a mathematics problem, attempts to solve it in their order, and a review of each. The last attempt "
    "is correct. Write all of it as one train of thought of a person who solves the problem for the first time: it "
    "tries, notices an error for the reason that the review gives, corrects it, and checks the result at the end. It "
    "knows neither attempts nor reviews, and not in advance what is wrong. End with the final answer in \\boxed{}."
)
Ranked = tuple[str, str]  # digest that orders attempts, response


@dataclass
class Attempts:
    """The chosen attempts at one problem."""

    question: str
    gold: str = ""
    incorrect: list[Ranked] = field(default_factory=list)
    correct: list[Ranked] = field(default_factory=list)

    def in_order(self) -> list[tuple[str, str]]:
        """Return verdict and response of each attempt, the correct one last."""
        rows = [("incorrect", text) for _, text in self.incorrect]
        return [*rows, *(("correct", text) for _, text in self.correct)]


def write_chains(
    sources: Sequence[str],
    output: Path,
    replies: Replies,
    is_correct: Callable[[str, str], bool],
    attempts: int = 3,
    threads: int = 64,
) -> Counter[str]:
    """Write `question`, `response` lines; return the number of problems by reason, "" for those in the output.

    `attempts`: most of a problem, one of them correct. `is_correct` compares a chain with a gold answer. The choice of
    the attempts does not depend on the order of lines and files. Raises ServersDown.
    """
    problems = _choose(sources, output, attempts)
    counts: Counter[str] = Counter()
    chains: list[Line] = []
    merge = partial(_chain, replies=replies, is_correct=is_correct)
    for problem, (text, reason) in zip(problems, _map(merge, problems, threads), strict=True):
        counts[reason] += 1
        if not reason:
            chains.append({"question": problem.question, "response": text})
    if not chains:
        raise ConfigError(
            f"none of the {len(problems)} problems has a chain ({describe_counts(counts)}); expected a correct "
            "rollout of a problem and a chain that repeats its answer: give more rollouts, or another --server"
        )
    write_lines(output, chains)
    return counts


def _map(merge: Callable[[Attempts], Text], problems: Sequence[Attempts], threads: int) -> Iterator[Text]:
    return replies.map_in_threads(merge, problems, threads)


def _choose(sources: Sequence[str], output: Path, attempts: int) -> list[Attempts]:
    """Return the problems of the files with their chosen attempts."""
    paths = [path for source in sources for path in labelled_rollouts.files_of(source)]
    if output.exists() and any(output.samefile(path) for path in paths):
        raise ConfigError(f"{output} is one of the inputs; give another name")
    problems: dict[str, Attempts] = {}
    for lines in (lines for source in sources for lines in labelled_rollouts.lines_by_step(source)):
        for location, line in lines:
            labelled_rollouts.check_rollout(location, line)
            _insert(problems.setdefault(line["question"], Attempts(line["question"])), line, attempts)
    return list(problems.values())


def _insert(problem: Attempts, line: Line, attempts: int) -> None:
    """Put a rollout among the attempts at its problem, if it is finished and its verdict is known."""
    is_correct = line["verdict"] == Outcome.CORRECT.value
    if not line.get("finished", True) or line.get("penalty") or line["verdict"] == Outcome.UNKNOWN.value:
        return
    gold = line.get("gold_answer")
    if is_correct and isinstance(gold, str):
        problem.gold = gold
    text = line["response"]
    ranked = hashlib.blake2b(f"{problem.question} {text}".encode(), digest_size=16).hexdigest(), text
    chosen, size = (problem.correct, 1) if is_correct else (problem.incorrect, attempts - 1)
    if ranked not in chosen:
        chosen[:] = heapq.nsmallest(size, [*chosen, ranked])


def _chain(problem: Attempts, replies: Replies, is_correct: Callable[[str, str], bool]) -> Text:
    """Return the chain of a problem, or the reason for which there is none."""
    if not (problem.correct and problem.gold):
        return Text("", NO_CORRECT)
    reviewed: list[tuple[str, str]] = []
    for verdict, attempt in problem.in_order():
        critique, reason = replies.text(critique_chat(problem.question, attempt, verdict))
        if reason:
            return Text("", reason)
        reviewed.append((attempt, critique))
    chain = replies.text(merge_chat(problem.question, reviewed))
    if chain.reason or is_correct(problem.gold, chain.text):
        return chain
    return Text("", INCORRECT)


def critique_chat(question: str, attempt: str, verdict: str) -> Chat:
    """Return the chat that requests the critique of an attempt."""
    text = f"# Problem\n{question}\n\n# Attempt, whose final answer is {verdict}\n{attempt}"
    return [{"role": "system", "content": CRITIQUE}, {"role": "user", "content": text}]


def merge_chat(question: str, reviewed: Sequence[tuple[str, str]]) -> Chat:
    """Return the chat that requests one chain from pairs of attempt and critique."""
    parts = [
        f"# Attempt {number}\n{attempt}\n\n# Review of attempt {number}\n{critique}"
        for number, (attempt, critique) in enumerate(reviewed, 1)
    ]
    text = "\n\n".join([f"# Problem\n{question}", *parts])
    return [{"role": "system", "content": MERGE}, {"role": "user", "content": text}]

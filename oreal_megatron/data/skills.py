"""`oreal data skills`: the core skill of each problem, and problems of the skills that a run fails (OREAL, section 4).

A language model names the skill. Questions that a run fails in several steps, with no correct rollout, name the skills
to practise: other problems of these skills are drawn, for demonstrations of them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from oreal_megatron.config import ConfigError
from oreal_megatron.data import labelled_rollouts, replies
from oreal_megatron.data.decisions import describe_counts
from oreal_megatron.data.lines import Line, local_file, read_lines, write_lines
from oreal_megatron.data.overlap import plain_form
from oreal_megatron.data.problems import read_problem
from oreal_megatron.data.replies import Replies
from oreal_megatron.records import Outcome
from oreal_megatron.runtime.chat_client import Chat

NO_PROBLEM = "no question"
NO_SKILL = "a reply that names no skill"
REASONS = (NO_PROBLEM, *replies.REASONS, NO_SKILL)
LONGEST_NAME = 8  # words of a skill
FORMULA = re.compile(r"[$\\=\n]")  # a small model solves the problem instead
PROMPT = (
    "Name the one core mathematical skill that the problem tests, as a heading of a textbook would, such as "
    '"Vieta\'s formulas" or "counting with inclusion and exclusion". Reply with the name only.'
)
CLOSED_PROMPT = "Name the one core mathematical skill that the problem tests. Reply with one of these names only:\n"


class Drawn(NamedTuple):
    """Counts of a draw."""

    failed: int  # questions that the run fails repeatedly
    unlisted: int  # of them, those that are not in the file
    skills: int  # of the others
    problems: int  # in the output


def annotate(
    source: str, output: Path, model_replies: Replies, names: Sequence[str] = (), threads: int = 64
) -> tuple[Counter[str], Counter[str]]:
    """Write the lines with a `skill`; return lines by reason, "" for those in the output, and lines by skill.

    Lines that have a skill are not sent. `names`: the only ones allowed. Raises ServersDown.
    """
    _refuse_same(source, output)
    counts: Counter[str] = Counter()
    skills: Counter[str] = Counter()
    allowed = {normalise(name): name for name in names}

    def annotated(numbered: tuple[int, Line]) -> tuple[Line, str]:
        return _with_skill(numbered[1], model_replies, allowed)

    def lines() -> Iterator[Line]:
        for line, reason in replies.map_in_threads(annotated, read_lines(source), threads):
            counts[reason] += 1
            if not reason:
                skills[line["skill"]] += 1
                yield line
        if not counts[""]:
            raise ConfigError(
                f"none of the {counts.total()} problems of {source} has a skill ({describe_counts(counts)}); expected "
                "lines with a question, and replies that name a skill: correct the file, or start with another model"
            )

    write_lines(output, lines())
    return counts, skills


def read_names(path: Path) -> list[str]:
    """Return the names of skills in a file, one per line; ConfigError where there is none."""
    names = [line.strip() for line in local_file(str(path)).read_text().splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"{path} holds no name of a skill; expected one per line")
    return names


def _with_skill(line: Line, model_replies: Replies, allowed: dict[str, str]) -> tuple[Line, str]:
    """Return a line with its skill, or the reason for which it has none."""
    try:
        question = read_problem("", line, {}, free_gold=True)["question"]
    except ConfigError:
        return line, NO_PROBLEM
    if isinstance(line.get("skill"), str):
        return line, ""
    text, reason = model_replies.text(skill_chat(question, list(allowed.values())))
    if reason:
        return line, reason
    name = named_skill(text, allowed) if allowed else free_name(text)
    return line | {"skill": name}, "" if name else NO_SKILL


def free_name(text: str) -> str:
    """Return the skill that a reply names; "" for an explanation or a formula instead of it."""
    name = normalise(text)
    return "" if FORMULA.search(name) or len(name.split()) > LONGEST_NAME else name


def named_skill(text: str, allowed: dict[str, str]) -> str:
    """Return the one name of `allowed` (by its normalised form) that a reply contains; "" if it has none or several."""
    longest_first = sorted(filter(None, allowed), key=len, reverse=True)  # of names within names
    matches = re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", normalise(text))
    return allowed[matches[0]] if len(set(matches)) == 1 else ""


def normalise(name: str) -> str:
    """Return a name in lower case, without quotes, emphasis and a full stop around it."""
    return name.strip().strip("\"'`*.").strip().lower()


def skill_chat(question: str, names: Sequence[str]) -> Chat:
    """Return the chat that requests the skill of a problem."""
    prompt = CLOSED_PROMPT + "\n".join(names) if names else PROMPT
    return [{"role": "system", "content": prompt}, {"role": "user", "content": question}]


def failed_questions(run: str, steps: int) -> set[str]:
    """Return the questions, in plain form, that had rollouts but no correct one in at least so many steps of a run."""
    failures: Counter[str] = Counter()
    for lines in labelled_rollouts.lines_by_step(run):
        verdicts: dict[str, set[str]] = defaultdict(set)
        for location, line in lines:
            labelled_rollouts.check_rollout(location, line)
            verdicts[plain_form(line["question"])].add(line["verdict"])
        failures.update(
            question for question, known in verdicts.items() if known - {Outcome.UNKNOWN.value} == {"incorrect"}
        )
    return {question for question, count in failures.items() if count >= steps}


def draw(source: str, output: Path, failed: set[str], per_failure: int, seed: int) -> Drawn:
    """Write problems of the skills of failed questions, so many for each; the failed ones are not among them.

    Every line needs a `skill`. The choice depends on the seed, not on the order of the lines.
    """
    _refuse_same(source, output)
    failures: Counter[str] = Counter()  # failed questions by skill
    candidates: dict[str, list[tuple[str, int]]] = defaultdict(list)  # digest and line number by skill
    listed: set[str] = set()
    for number, line in read_lines(source):
        question, skill = plain_form(_question(f"{source} line {number}", line)), line["skill"]
        if question in listed:
            continue
        listed.add(question)
        if question in failed:
            failures[skill] += 1
        else:
            digest = hashlib.blake2b(f"{seed} {question}".encode(), digest_size=16).hexdigest()
            candidates[skill].append((digest, number))
    drawn = {
        number for skill, count in failures.items() for _, number in sorted(candidates[skill])[: count * per_failure]
    }
    if not drawn:
        raise ConfigError(
            f"nothing was drawn: {len(failed)} questions are failed repeatedly, {failures.total()} of them are in "
            f"{source}, of {len(failures)} skills with no other problem; lower --steps, or give a larger file"
        )
    write_lines(output, (line for number, line in read_lines(source) if number in drawn))
    return Drawn(len(failed), len(failed) - failures.total(), len(failures), len(drawn))


def _question(name: str, line: Line) -> str:
    """Return the question of a line; ConfigError where it or its skill is missing."""
    if not isinstance(line.get("skill"), str):
        raise ConfigError(f"{name} has no skill; annotate the file first: oreal data skills IN OUT --server URL")
    return str(read_problem(name, line, {}, free_gold=True)["question"])


def _refuse_same(source: str, output: Path) -> None:
    if output.exists() and output.samefile(local_file(source)):
        raise ConfigError(f"{output} is the input itself; give another name")

"""Make two-step arithmetic word problems for a small pretrained policy, and worked responses to some of them.

    python tools/make_word_problems.py runs/smollm2 --seed 0

writes problems.jsonl, demonstrations.jsonl and held_out.jsonl; no problem is in two of them.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "nails", "pencils", "shells", "stamps")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# A question, and its two steps; `_` is the result of the first.
KINDS = (
    ("{name} has {a} {things} and buys {b} boxes of {c} {things}. How many {things} does {name} have now?",
     ("{b} * {c}", "{a} + {_}")),
    ("There are {b} shelves with {c} {things} on each. {name} adds {a} {things}. How many {things} are there now?",
     ("{b} * {c}", "{_} + {a}")),
    ("{name} needs {a} {things} for each of {b} friends and keeps {c}. How many {things} does {name} need in all?",
     ("{a} * {b}", "{_} + {c}")),
    ("{name} packs {b} bags with {a} {things} each. Then {c} {things} are taken out. How many {things} are left?",
     ("{b} * {a}", "{_} - {c}")),
    ("{name} finds {a} {things} on Monday and {c} on Tuesday, and sells them for {b} cents each. "
     "How many cents does {name} get?",
     ("{a} + {c}", "{_} * {b}")),
)  # fmt: skip


def problems(generator: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield question, worked response and result forever, without repetition."""
    seen = set()
    while True:
        question, steps = generator.choice(KINDS)
        words = {"name": generator.choice(NAMES), "things": generator.choice(THINGS)}
        numbers = {"a": generator.randint(11, 50), "b": generator.randint(3, 9), "c": generator.randint(3, 19)}
        if (text := question.format(**words, **numbers)) not in seen:
            seen.add(text)
            yield text, *work_out(steps, numbers)


def work_out(steps: tuple[str, str], numbers: dict[str, int]) -> tuple[str, str]:
    """Return both steps in full with the result in a box, and the result."""
    lines, known = [], numbers
    for step in steps:
        left, sign, right = (task := step.format(**known)).split()
        known = known | {"_": OPERATIONS[sign](int(left), int(right))}
        lines.append(f"{task} = {known['_']}.")
    return f"{' '.join(lines)} The answer is \\boxed{{{known['_']}}}.", str(known["_"])


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--demonstrations", type=int, default=1000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    stream = problems(random.Random(args.seed))
    for name, count in (("problems", args.training), ("held_out", args.held_out)):
        lines = [next(stream) for _ in range(count)]
        unanswered = [{"question": question, "gold_answer": gold, "pass_rate": None} for question, _, gold in lines]
        write(args.folder / f"{name}.jsonl", unanswered)
    lines = [next(stream) for _ in range(args.demonstrations)]
    demonstrations = [{"question": question, "response": response} for question, response, _ in lines]
    write(args.folder / "demonstrations.jsonl", demonstrations)
    counts = f"{args.training} problems, {args.held_out} held-out problems, {args.demonstrations} demonstrations"
    print(f"{args.folder}: {counts}")


if __name__ == "__main__":
    main()

"""Make the task of examples/long_tail.sh: chains of digits whose number of steps is log-normal, and a random policy.

    python tools/make_long_tail_task.py runs/long_tail --seed 0

writes runs/long_tail/start (a small Qwen2 policy and its tokenizer), problems, held_out, chains and
demonstrations.jsonl. chained_digits.py shows the text. Half of the responses have at most 9 tokens, one in a hundred
about 300 or more, none above 385. chains.jsonl has demonstrations without wrong digits, demonstrations.jsonl those of a
careless hand, which a policy imitates so that its samples of a problem differ in their outcome. Both have longer
responses than the problems, so that all lengths are learnt. The first digits of held-out problems begin no other chain.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import chained_digits
from small_model import make_model, write_lines

MEDIAN, SIGMA = 2.2, 1.5  # steps of a problem, and standard deviation of their logarithm
TAUGHT_MEDIAN = 4.0  # steps of a demonstration
ERROR_RATES = {"chains": 0.0, "demonstrations": 0.1}  # file: probability that a digit is wrong
SHAPE = {"layers": 2, "hidden": 128, "heads": (4, 4), "deviation": 0.1, "rope_theta": 100.0}


def steps_of(generator: random.Random, median: float) -> int:
    """Draw the number of steps of a response."""
    return min(max(round(generator.lognormvariate(math.log(median), SIGMA)), 1), chained_digits.LONGEST)


def problem(digits: Sequence[int], steps: int) -> dict[str, str | None]:
    """Return a line of a problem file."""
    text, gold = chained_digits.question(digits, steps), chained_digits.answer(digits, steps)
    return {"question": text, "gold_answer": gold, "pass_rate": None}


def make_problems(path: Path, seed: int, training: int, held_out: int, demonstrations: int) -> None:
    """Write problems, each with its own first digits, and demonstrations, which share them with training problems."""
    generator = random.Random(seed)
    numbers = generator.sample(range(10**chained_digits.GIVEN), training + held_out)
    starts = [[int(digit) for digit in f"{number:0{chained_digits.GIVEN}d}"] for number in numbers]
    problems = [problem(digits, steps_of(generator, MEDIAN)) for digits in starts]
    write_lines(path / "problems.jsonl", problems[:training])
    write_lines(path / "held_out.jsonl", problems[training:])
    for name, error_rate in ERROR_RATES.items():
        lines = []
        for _ in range(demonstrations):
            digits, steps = generator.choice(starts[:training]), steps_of(generator, TAUGHT_MEDIAN)
            response = chained_digits.careless_response(digits, steps, error_rate, generator)
            lines.append({"question": chained_digits.question(digits, steps), "response": response})
        write_lines(path / f"{name}.jsonl", lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--demonstrations", type=int, default=20000, help="lines of each of the two files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder / "start", args.seed, **SHAPE)
    make_problems(args.folder, args.seed, args.training, args.held_out, args.demonstrations)
    demonstrations = f"{len(ERROR_RATES)} x {args.demonstrations} demonstrations"
    print(f"{args.folder}: a model, {args.training} problems, {args.held_out} held-out problems, {demonstrations}")


if __name__ == "__main__":
    main()

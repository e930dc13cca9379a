"""Make the checked task: a small Qwen2 policy with random weights and its tokenizer, and running sums modulo 10.

    python tools/make_checked_task.py runs/checked --seed 0

writes runs/checked/start (a model folder), problems, held_out, demonstrations and checks.jsonl. checked_steps.py shows
the text. The demonstrations are by a careless hand: a step is wrong with a probability of 15 %, the checks are right. A
policy taught on them errs as often, and its states hold which steps were wrong, as those of a pretrained model may.
sums.jsonl has demonstrations without wrong steps, from which sums are learnt with each of two seeds, and checks.jsonl
some with 50 % wrong steps, from which checks are learnt in fewer updates. Held-out problems appear in no other file.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import checked_steps
from small_model import make_model, write_lines

ERROR_RATES = {"sums": 0.0, "demonstrations": 0.15, "checks": 0.5}  # file: probability that a step is wrong
# With 64 channels, a deviation of 0.02 or a rotary base of 10000, the sums were learnt late, or not, by seed.
SHAPE = {"layers": 2, "hidden": 128, "heads": (4, 4), "deviation": 0.1, "rope_theta": 100.0}


def make_problems(path: Path, seed: int, training: int, held_out: int, demonstrations: int) -> None:
    """Write distinct problems to the files, so many demonstrations to each of theirs."""
    generator = random.Random(seed)
    numbers = generator.sample(range(10**checked_steps.TERMS), training + held_out + len(ERROR_RATES) * demonstrations)
    sums = [[int(digit) for digit in f"{number:0{checked_steps.TERMS}d}"] for number in numbers]
    problems = [
        {"question": checked_steps.question(terms), "gold_answer": checked_steps.answer(terms), "pass_rate": None}
        for terms in sums[: training + held_out]
    ]
    write_lines(path / "problems.jsonl", problems[:training])
    write_lines(path / "held_out.jsonl", problems[training:])
    for number, (name, error_rate) in enumerate(ERROR_RATES.items()):
        start = training + held_out + number * demonstrations
        worked = (
            (checked_steps.question(terms), checked_steps.careless_response(terms, error_rate, generator))
            for terms in sums[start : start + demonstrations]
        )
        write_lines(path / f"{name}.jsonl", ({"question": text, "response": response} for text, response in worked))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=20000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--demonstrations", type=int, default=24000, help="lines of each of the three files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder / "start", args.seed, **SHAPE)
    make_problems(args.folder, args.seed, args.training, args.held_out, args.demonstrations)
    demonstrations = f"{len(ERROR_RATES)} x {args.demonstrations} demonstrations"
    counts = f"{args.training} problems, {args.held_out} held-out problems, {demonstrations}"
    print(f"{args.folder}: a model, {counts}")


if __name__ == "__main__":
    main()

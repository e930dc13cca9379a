"""Make the addition task: a small Qwen2 policy with random weights and its tokenizer, and addition problems.

    python tools/make_addition_task.py runs/addition --seed 0

writes runs/addition/start (model folder) and problems.jsonl, demonstrations.jsonl, held_out.jsonl. The problems are
sums of two numbers below 1000 (--below); held-out sums appear in no other file. --student writes a model of two layers
beside it, for examples/distill.sh.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from small_model import make_model, write_lines


def make_problems(path: Path, seed: int, training: int, held_out: int, demonstrations: int, below: int = 1000) -> None:
    """Write distinct sums of two numbers smaller than `below` to the three files."""
    generator = random.Random(seed)
    pairs = generator.sample(range(below * below), training + held_out + demonstrations)
    sums = [(f"{pair // below}+{pair % below}=", str(pair // below + pair % below)) for pair in pairs]
    problems = [{"question": question, "gold_answer": answer, "pass_rate": None} for question, answer in sums]
    write_lines(path / "problems.jsonl", problems[:training])
    write_lines(path / "held_out.jsonl", problems[training : training + held_out])
    worked = [{"question": question, "response": f"\\boxed{{{answer}}}"} for question, answer in sums]
    write_lines(path / "demonstrations.jsonl", worked[training + held_out :])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--demonstrations", type=int, default=60000)
    parser.add_argument("--below", type=int, default=1000)
    parser.add_argument("--student", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder / "start", args.seed)
    if args.student:
        make_model(args.folder / "student", args.seed + 1, layers=2)
    make_problems(args.folder, args.seed, args.training, args.held_out, args.demonstrations, args.below)
    counts = f"{args.training} problems, {args.held_out} held-out problems, {args.demonstrations} demonstrations"
    print(f"{args.folder}: a model, {counts}")


if __name__ == "__main__":
    main()

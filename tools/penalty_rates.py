#!/usr/bin/env python3
"""Measure the penalties of responses: share of real solutions that are hit, and of degenerate ones.

    python tools/penalty_rates.py --tokenizer MODEL SOLUTIONS.jsonl:FIELD ...

FIELD holds the text of a correct solution. Without a `question`, all scripts of the solution are expected. Lines with
`label` 0 or with `is_correct` false are left out. Degenerate responses are made from these solutions with a fixed seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oreal_megatron.algo.response_penalties import find_penalty
from oreal_megatron.config import PenaltyConfig
from oreal_megatron.data.problems import load_tokenizer
from oreal_megatron.evaluation.statistics import wilson_interval
from oreal_megatron.records import Prompt, Rollout

ALL = PenaltyConfig(repetition=True, gibberish=True)  # overlong needs no rule
FOREIGN_WORDS = (
    "因此 我们 得到 答案 数字 所以 значит число ответ поэтому 그러므로 답은 すなわち ゆえに الجواب ดังนั้น".split()
)
Texts = tuple[str, str]  # question and solution
Tokens = list[int]


def read_solutions(sources: Sequence[str]) -> Iterator[Texts]:
    """Yield question and solution of each correct line of FILE:FIELD."""
    for source in sources:
        file, _, field = source.rpartition(":")
        for text in Path(file).read_text().splitlines():
            line = json.loads(text)
            if line.get("label", 1) and line.get("is_correct", True) and line.get("form", "text") == "text":
                yield line.get("question", line[field]), line[field]


def loop(tokens: Tokens, draw: random.Random, vocabulary: int) -> Tokens:
    """Repeat 1 to 80 tokens of a solution at least four times, for more than half of a response of 300 to 2000."""
    start = tokens[: draw.randint(1, len(tokens))]
    phrase = start[-draw.randint(1, 80) :]
    length = len(phrase) + max(4 * len(phrase), len(start), draw.randint(300, 2000) - len(start))
    return start + phrase * (length // len(phrase) + 1)


def late_loop(tokens: Tokens, draw: random.Random, vocabulary: int) -> Tokens:
    """Fill the last tenth of a long response with a loop; the tokens before it are drawn at random."""
    start = [draw.randrange(vocabulary) for _ in range(draw.randint(3000, 6000))]
    phrase = tokens[-draw.randint(1, 60) :]
    return start + phrase * (max(len(start) // 9, 12 * max(len(phrase), 32)) // len(phrase) + 1)


def restart(tokens: Tokens, draw: random.Random, vocabulary: int) -> Tokens:
    """Write the solution three to ten times."""
    return tokens * max(draw.randint(3, 10), 100 // len(tokens) + 1)


def random_tokens(tokens: Tokens, draw: random.Random, vocabulary: int) -> Tokens:
    """Continue a start of the solution with tokens drawn from all of the vocabulary, as a collapsed policy does."""
    start = tokens[: draw.randint(0, len(tokens))]
    return start + [draw.randrange(vocabulary) for _ in range(draw.randint(60, 400))]


def foreign_words(text: str, draw: random.Random) -> str:
    """Replace 3 to 30 per cent of the words of a solution, at least three, by words of other scripts."""
    words = text.split(" ")
    count = min(max(3, round(draw.uniform(0.03, 0.3) * len(words))), len(words))
    for at in draw.sample(range(len(words)), count):
        words[at] = draw.choice(FOREIGN_WORDS)
    return " ".join(words)


def broken_bytes(text: str, draw: random.Random) -> str:
    """Change 4 to 20 bytes of a solution into ones above 127, most of which are no UTF-8."""
    raw = bytearray(text.encode())
    for at in draw.sample(range(len(raw)), min(len(raw), draw.randint(4, 20))):
        raw[at] = draw.randint(128, 255)
    return raw.decode(errors="replace")


TOKEN_KINDS: dict[str, Callable[[Tokens, random.Random, int], Tokens]] = {
    "loop": loop, "late loop": late_loop, "restarts": restart, "random tokens": random_tokens,
}  # fmt: skip
TEXT_KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "foreign words": foreign_words, "broken bytes": broken_bytes,
}  # fmt: skip


def response(tokenizer: PreTrainedTokenizerBase, question: str, tokens: Tokens, text: str | None = None) -> Rollout:
    """Return a response as the engine would."""
    text = tokenizer.decode(tokens) if text is None else text
    return Rollout(Prompt(0, question, "", None, ()), 0, 0, tuple(tokens), text, True)


def degenerate(tokenizer: PreTrainedTokenizerBase, solutions: Sequence[Texts], kind: str, seed: int) -> list[Rollout]:
    """Return degenerate responses of one kind, one for each solution of at least 20 characters."""
    draw, result = random.Random(f"{kind} {seed}"), []
    for question, text in solutions:
        if len(text) < 20:
            continue
        if kind in TOKEN_KINDS:
            tokens = TOKEN_KINDS[kind](tokenizer.encode(text, add_special_tokens=False), draw, tokenizer.vocab_size)
            result.append(response(tokenizer, question, tokens))
        else:
            text = TEXT_KINDS[kind](text, draw)
            result.append(response(tokenizer, question, tokenizer.encode(text, add_special_tokens=False), text))
    return result


def report(name: str, rollouts: Sequence[Rollout], config: PenaltyConfig) -> None:
    """Print how many responses get a penalty, with a 95 % Wilson interval."""
    hits = [(rollout, penalty) for rollout in rollouts if (penalty := find_penalty(rollout, config))]
    low, high = wilson_interval(len(hits), len(rollouts))
    print(f"{name:34} {len(hits):6} of {len(rollouts):6}  {len(hits) / len(rollouts):7.2%}  ({low:.2%} to {high:.2%})")
    if name.startswith("real"):
        for rollout, penalty in hits[:10]:
            print(f"    {penalty}: ...{rollout.text[-150:]!r}")


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", nargs="+", metavar="FILE.jsonl:FIELD")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument("--degenerate", type=int, default=500, metavar="N", help="solutions that degenerate ones use")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    for source in args.solutions:
        texts = list(read_solutions([source]))
        rollouts = [response(tokenizer, q, tokenizer.encode(t, add_special_tokens=False), t) for q, t in texts]
        report(f"real: {Path(source).name}", rollouts, ALL)
    everyone = list(read_solutions(args.solutions))
    solutions = random.Random(args.seed).sample(everyone, min(args.degenerate, len(everyone)))
    everything: list[Rollout] = []
    for kind in (*TOKEN_KINDS, *TEXT_KINDS):
        made = degenerate(tokenizer, solutions, kind, args.seed)
        everything += made
        config = dataclasses.replace(ALL, gibberish=False) if "loop" in kind else ALL
        report(f"degenerate: {kind}", made, config)
    report("degenerate: all", everything, ALL)


if __name__ == "__main__":
    main()

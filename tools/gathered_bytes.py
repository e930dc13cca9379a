"""Measure what the exchange of a step's rollouts sends, and what they fill on every rank; no process group is needed.

    python tools/gathered_bytes.py [--ranks 128] [--rollouts 1024] [--tokens 14000] [--measured-tokens 1400]

Responses of `--measured-tokens` are packed as a rank sends them and unpacked as every rank holds them; both sizes are
proportional to the length, so that of `--tokens` follows.
"""

from __future__ import annotations

import argparse
import pickle
import random
import tracemalloc

from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.rollout import growth

VOCABULARY, CHARACTERS = 152_064, 4  # of Qwen2.5; letters of a token, on average


def response(slot: int, tokens: int, with_logprobs: bool) -> Rollout:
    """Return a complete response of random tokens."""
    drawn = random.Random(slot)
    ids = tuple(drawn.randrange(VOCABULARY) for _ in range(tokens))
    logprobs = tuple(-drawn.random() for _ in range(tokens)) if with_logprobs else None
    text = "".join(drawn.choices("abcdefghijklmnop 0123456789+=", k=CHARACTERS * tokens))
    return Rollout(Prompt(slot, "", "", None, (1,)), slot, 0, ids, text, True, logprobs)


def bytes_per_token(tokens: int, with_logprobs: bool, samples: int = 8) -> tuple[float, float]:
    """Return bytes of a response's token as it is sent, and as a rank holds it."""
    grown = [response(slot, tokens, with_logprobs) for slot in range(samples)]
    before = growth.blank_rollouts([rollout.prompt for rollout in grown], 1)
    packed = pickle.dumps(growth.new_parts(grown, before))
    tracemalloc.start()
    unpacked = pickle.loads(packed)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del unpacked
    return len(packed) / samples / tokens, memory / samples / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=14_000)
    parser.add_argument("--measured-tokens", type=int, default=1400)
    arguments = parser.parse_args()
    everything = arguments.rollouts * arguments.tokens
    print("| exchange of a step | bytes a token | sent by a rank | received and held on every rank |")
    print("|---|---|---|---|")
    for name, with_logprobs in (("tokens and texts", False), ("with log-probs of all tokens", True)):
        sent, held = bytes_per_token(arguments.measured_tokens, with_logprobs)
        print(
            f"| {name} | {sent:.1f} sent, {held:.1f} held | {everything * sent / arguments.ranks / 2**20:.1f} MiB "
            f"| {everything * sent / 2**30:.2f} GiB, {everything * held / 2**30:.2f} GiB |"
        )


if __name__ == "__main__":
    main()

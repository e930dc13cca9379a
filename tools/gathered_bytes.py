"""Measure what a rank receives of a step's rollouts and samples, and what they fill; one process is enough.

    python tools/gathered_bytes.py [--ranks 128] [--engine-tensor 8] [--data-parallel 8] [--rollouts 1024]
        [--samples 128] [--tokens 14000] [--measured-tokens 1400]

What is proportional to the length is measured with responses of `--measured-tokens`.
"""

from __future__ import annotations

import argparse
import pickle
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.rollout import growth

VOCABULARY, CHARACTERS = 152_064, 4  # of Qwen2.5; letters of a token, on average
EXCHANGED_BYTES = 4  # of a token (int32) and of a log-prob (float32) of a sample
COUNT = 64  # rollouts that are measured


@dataclass(frozen=True)
class StepSize:
    """Size of a step and of the job."""

    ranks: int
    engine_tensor: int
    data_parallel: int
    rollouts: int
    samples: int
    tokens: int  # of each response


@dataclass(frozen=True)
class RankBytes:
    """Bytes of a rank in a step."""

    received_states: float  # key, number of tokens, end and checksum of every rollout
    received_values: float  # tokens and log-probs of its samples
    held_states: float  # rollouts of other replicas
    held_values: float  # its replica's rollouts and its samples


def response(slot: int, tokens: int, with_logprobs: bool) -> Rollout:
    """Return a complete response of random tokens."""
    drawn = random.Random(slot)
    ids = tuple(drawn.randrange(VOCABULARY) for _ in range(tokens))
    logprobs = tuple(-drawn.random() for _ in range(tokens)) if with_logprobs else None
    text = "".join(drawn.choices("abcdefghijklmnop 0123456789+=", k=CHARACTERS * tokens))
    return Rollout(Prompt(slot, "", "", None, (1,)), slot, 0, ids, text, True, logprobs)


def memory_of(build: Callable[[], object]) -> int:
    """Return the bytes of what a function returns."""
    tracemalloc.start()
    built = build()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del built
    return memory


def rank_bytes(size: StepSize, with_logprobs: bool, measured_tokens: int) -> RankBytes:
    """Return the bytes of a rank whose samples all come from other replicas."""
    grown = [response(slot, measured_tokens, with_logprobs) for slot in range(COUNT)]
    states = pickle.dumps([growth.growth_of(rollout) for rollout in grown])
    blank = growth.blank_rollouts([rollout.prompt for rollout in grown], 1)
    known: list[growth.Growth] = pickle.loads(states)
    held_state = memory_of(lambda: [growth.append_remote(*pair, 0, 2) for pair in zip(blank, known, strict=True)])
    values = pickle.dumps([(rollout.tokens, rollout.logprobs) for rollout in grown])
    texts = pickle.dumps([rollout.text for rollout in grown])
    per_token = memory_of(lambda: pickle.loads(values)) / COUNT / measured_tokens
    text_per_token = memory_of(lambda: pickle.loads(texts)) / COUNT / measured_tokens
    own = size.rollouts * size.engine_tensor / size.ranks * size.tokens
    samples = size.samples / size.data_parallel * size.tokens
    return RankBytes(
        received_states=len(states) / COUNT * size.rollouts * size.engine_tensor,
        received_values=samples * EXCHANGED_BYTES * (1 + with_logprobs),
        held_states=held_state / COUNT * size.rollouts,
        held_values=own * (per_token + text_per_token) + samples * per_token,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (
        ("ranks", 128), ("engine-tensor", 8), ("data-parallel", 8), ("rollouts", 1024), ("samples", 128),
        ("tokens", 14_000), ("measured-tokens", 1400),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    measured_tokens = arguments.pop("measured_tokens")
    size = StepSize(**arguments)
    print("| a rank in a step | receives: states, samples | holds: states, values | in all |")
    print("|---|---|---|---|")
    for name, with_logprobs in (("tokens and texts", False), ("with log-probs of all tokens", True)):
        own = rank_bytes(size, with_logprobs, measured_tokens)
        print(
            f"| {name} | {own.received_states / 2**20:.2f} MiB, {own.received_values / 2**20:.1f} MiB "
            f"| {own.held_states / 2**20:.2f} MiB, {own.held_values / 2**20:.1f} MiB "
            f"| {(own.held_states + own.held_values) / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()

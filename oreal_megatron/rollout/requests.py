"""Requests to vLLM and rollouts from its outputs. The seed of a request does not depend on the replica serving it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.runtime import distributed


@dataclass(frozen=True)
class Request:
    """One rollout to be generated."""

    prompt: Prompt
    slot: int
    index: int


def deal(prompts: int, per_prompt: int, replica: int, replicas: int) -> list[tuple[int, int]]:
    """Return the (slot, index) of a replica's rollouts: some of every prompt, whose lengths resemble each other.

    Rollout 0 of a prompt belongs to replica slot % replicas.
    """
    everything = itertools.product(range(prompts), range(per_prompt))
    return [(slot, index) for slot, index in everything if (slot + index) % replicas == replica]


def request_seed(run_seed: int, step: int, slot: int, index: int) -> int:
    """Return the 31-bit seed of one request."""
    digest = hashlib.blake2b(f"{run_seed} {step} {slot} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def sampling_params(
    sampling: SamplingConfig, temperature: float, stop_tokens: Sequence[int], request_seed: int, with_logprobs: bool
) -> SamplingParams:
    """Return vLLM's parameters of one request; `temperature` is applied to the logits that the model returns."""
    return SamplingParams(
        temperature=temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        max_tokens=sampling.max_new_tokens,
        seed=request_seed,
        stop_token_ids=list(stop_tokens),
        logprobs=0 if with_logprobs else None,  # 0: of the sampled token only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def is_complete(output: Any) -> bool:
    """Check that vLLM finished a response; aborted and empty ones are generated again."""
    return bool(output.token_ids) and output.finish_reason in ("stop", "length")


def to_rollout(request: Request, output: Any, text: str, version: int) -> Rollout:
    """Return the rollout of a finished request; `text` is the decoded response."""
    tokens = tuple(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True))
    return Rollout(
        prompt=request.prompt,
        slot=request.slot,
        index=request.index,
        tokens=tokens,
        text=text,
        finished=output.finish_reason == "stop",
        logprobs=logprobs,
        version=version,
    )


def gather_rollouts(own: Sequence[Rollout], prompts: Sequence[Prompt], per_prompt: int) -> list[list[Rollout]]:
    """Return all [P, K] rollouts on every rank from the ranks' own. Prompts are known everywhere and do not travel."""
    parts = [(r.slot, r.index, r.tokens, r.text, r.finished, r.logprobs, r.version) for r in own]
    table: list[list[Any]] = [[None] * per_prompt for _ in prompts]
    for slot, index, *fields in (
        part for parts_of_rank in distributed.all_gather_object(parts) for part in parts_of_rank
    ):
        table[slot][index] = Rollout(prompts[slot], slot, index, *fields)
    return table

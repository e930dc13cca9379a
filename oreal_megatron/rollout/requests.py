"""Requests to vLLM, and rollouts from its outputs. The seed of a request does not depend on the replica serving it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import Rollout
from oreal_megatron.rollout import growth


def request_seed(run_seed: int, step: int, slot: int, index: int, start: int = 0) -> int:
    """Return the 31-bit seed of one request; `start`: tokens that its response has already."""
    later = f" {start}" if start else ""
    digest = hashlib.blake2b(f"{run_seed} {step} {slot} {index}{later}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def sampling_params(
    sampling: SamplingConfig,
    temperature: float,
    stop_tokens: Sequence[int],
    request_seed: int,
    with_logprobs: bool,
    max_tokens: int,
) -> SamplingParams:
    """Return vLLM's parameters of one request; `temperature` is applied to the logits that the model returns."""
    return SamplingParams(
        temperature=temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        max_tokens=max_tokens,
        seed=request_seed,
        stop_token_ids=list(stop_tokens),
        logprobs=0 if with_logprobs else None,  # 0: of the sampled token only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def is_complete(output: Any) -> bool:
    """Check that vLLM finished a response; aborted and empty ones are generated again."""
    return bool(output.token_ids) and output.finish_reason in ("stop", "length")


def grow(rollout: Rollout, output: Any, version: int) -> Rollout:
    """Return a rollout with the tokens of a finished request, which a version of the policy wrote; without text."""
    tokens = tuple(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True))
    return growth.append(rollout, tokens, logprobs, output.finish_reason == "stop", version)

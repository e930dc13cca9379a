"""The pool of prompts in flight as a file of a checkpoint, so that a resumed run continues their responses.

`rollout_pool.safetensors` holds the tokens and log-probs of all responses end to end, and as JSON in `index` one row
per prompt and rollout. Prompts are not in it: positions in the order of the dataset name them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from oreal_megatron.config import ConfigError
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict
from oreal_megatron.rollout.pool_schedule import PooledPrompt, PromptPool

NAME = "rollout_pool.safetensors"


def to_bytes(pool: PromptPool) -> bytes:
    """Return the content of the file."""
    rollouts = list(pool.rollouts())
    index = {
        "next_position": pool.next_position,
        "prompts": [_prompt_row(prompt) for prompt in pool.prompts],
    }
    logprobs = [value for rollout in rollouts for value in rollout.logprobs or [math.nan] * len(rollout.tokens)]
    tensors = {
        "index": torch.frombuffer(bytearray(json.dumps(index).encode()), dtype=torch.uint8),
        "tokens": torch.tensor([token for rollout in rollouts for token in rollout.tokens], dtype=torch.int32),
        "logprobs": torch.tensor(logprobs, dtype=torch.float64),
    }
    return save(tensors)


def from_bytes(content: bytes, problem: Callable[[int], Prompt]) -> PromptPool:
    """Return the pool; `problem` returns the problem at a position of the dataset's order."""
    tensors = load(content)
    index = json.loads(tensors["index"].numpy().tobytes())
    tokens, logprobs = iter(tensors["tokens"].tolist()), iter(tensors["logprobs"].tolist())
    prompts = []
    for row in index["prompts"]:
        prompt = problem(row["position"])
        rollouts = []
        for number, fields in enumerate(row["rollouts"]):
            count = fields.pop("tokens")
            own_tokens = tuple(next(tokens) for _ in range(count))
            own_logprobs = tuple(next(logprobs) for _ in range(count))
            fields["versions"] = tuple((version, run) for version, run in fields["versions"])
            known = own_logprobs if fields.pop("logprobs") else None
            rollouts.append(Rollout(prompt, row["slot"], number, own_tokens, logprobs=known, **fields))
        verdicts = tuple(fields and _verdict(fields) for fields in row["verdicts"])
        prompts.append(PooledPrompt(row["position"], row["first_step"], tuple(rollouts), verdicts))
    return PromptPool(tuple(prompts), index["next_position"])


def read(checkpoint: Path, problem: Callable[[int], Prompt]) -> PromptPool | None:
    """Return the pool of a checkpoint; None where it has none, because the run had no pool then."""
    file = checkpoint / NAME
    if not file.is_file():
        return None
    try:
        return from_bytes(file.read_bytes(), problem)
    except (SafetensorError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"{file} is not a pool of rollouts that this version can read ({error!r}); resume from another checkpoint "
            "with --step, or delete the file to begin with an empty pool"
        ) from None


def _prompt_row(prompt: PooledPrompt) -> dict[str, Any]:
    return {
        "position": prompt.position,
        "slot": prompt.slot,
        "first_step": prompt.first_step,
        "rollouts": [_rollout_row(rollout) for rollout in prompt.rollouts],
        "verdicts": [
            verdict and dataclasses.asdict(verdict) | {"outcome": verdict.outcome.value} for verdict in prompt.verdicts
        ],
    }


def _rollout_row(rollout: Rollout) -> dict[str, Any]:
    return {
        "tokens": len(rollout.tokens),
        "logprobs": rollout.logprobs is not None,
        "text": rollout.text,
        "finished": rollout.finished,
        "version": rollout.version,
        "versions": rollout.versions,
    }


def _verdict(fields: dict[str, Any]) -> Verdict:
    return Verdict(**fields | {"outcome": Outcome(fields["outcome"])})

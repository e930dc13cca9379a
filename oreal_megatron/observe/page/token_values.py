"""Values per token of the rollouts that a step was trained on, from its dump."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.dumps import DumpShare, read_dump

Decode = Callable[[int], str]  # the text of a token
Key = tuple[int, int]  # slot of the prompt, index of the rollout


def of_step(folder: Path, decode: Decode) -> dict[Key, dict[str, Any]]:
    """Return tokens and values of a dumped step's rollouts; {} where there is no dump that can be read."""
    if not folder.is_dir():
        return {}
    try:
        dump = read_dump(folder)
        shares = [dump.share(rank, dump.shares) for rank in range(dump.shares)]
    except ConfigError:  # incomplete after a crash
        return {}
    return {key: values for share in shares for key, values in _of_share(share, decode)}


def _of_share(share: DumpShare, decode: Decode) -> list[tuple[Key, dict[str, Any]]]:
    rollouts = []
    for number, part in enumerate(share.batch.micro_batches):
        columns = {
            "weight": _entry(share.token_weights.values, number),
            "score": _entry(share.token_weights.scores, number),
            "logp": part.engine_logprobs,
            "reference": _entry(share.reference_logp or (), number),
        }
        rows = zip(
            part.rollouts.tolist(), part.advantage.tolist(), pairwise(part.action_offsets.tolist()), strict=False
        )
        for (slot, index), advantage, (start, stop) in rows:
            if slot < 0 or stop <= start:
                continue
            values = {name: _numbers(value_T[start:stop]) for name, value_T in columns.items() if value_T is not None}
            tokens = [decode(token) for token in part.labels[start:stop].tolist()]
            known = {name: numbers for name, numbers in values.items() if any(n is not None for n in numbers)}
            rollouts.append(((slot, index), {"advantage": _number(advantage), "tokens": tokens, **known}))
    return rollouts


def _entry(values: Sequence[Tensor], number: int) -> Tensor | None:
    return values[number] if number < len(values) else None


def _numbers(value_T: Tensor) -> list[float | None]:
    return [_number(value) for value in value_T.tolist()]


def _number(value: float) -> float | None:
    """Return a value with four digits, None for nan and infinities, which JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None

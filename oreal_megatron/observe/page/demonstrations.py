"""Demonstrations of the newest dumped step of `oreal sft` or `oreal distill`, those of the largest loss first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.dumps import Dump, DumpShare, read_dump
from oreal_megatron.observe.page import tables
from oreal_megatron.observe.page.run_data import RunData
from oreal_megatron.observe.page.token_values import Decode

MOST_ROWS = 50
HEAD = ("line", "turn", "tokens", "loss", "least probable token", "its log-prob", "response")


class Demonstration(NamedTuple):
    """A demonstrated response, and the policy's log-probs of its tokens before the step."""

    line: int  # of the file, from 1
    turn: int  # of the line's chat, from 0
    tokens: list[int]
    logp: list[float]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the tokens, in nats; infinite where it is not a number."""
        mean = -sum(self.logp) / len(self.logp)
        return math.inf if math.isnan(mean) else mean


def newest_step(run: Path) -> Dump | None:
    """Return the newest dump of demonstrations that can be read; None if there is none."""
    for folder in sorted((run / "dumps").glob("step_*"), reverse=True):
        try:
            dump = read_dump(folder)
        except ConfigError:  # incomplete after a crash
            continue
        return dump if dump.of_demonstrations else None
    return None


def read(dump: Dump) -> list[Demonstration]:
    """Return the demonstrations of all shares of a dump, those of the largest loss first."""
    shares = (dump.share(rank, dump.shares) for rank in range(dump.shares))
    return sorted((row for share in shares for row in _of_share(share)), key=lambda row: row.loss, reverse=True)


def _of_share(share: DumpShare) -> Iterator[Demonstration]:
    for part, logp_T in zip(share.batch.micro_batches, share.demonstrated_logp, strict=True):
        rows = zip(part.rollouts.tolist(), pairwise(part.action_offsets.tolist()), strict=False)
        for (line, turn), (start, stop) in rows:
            if line >= 0 and stop > start:  # not the padding of an empty micro-batch
                yield Demonstration(line, turn, part.labels[start:stop].tolist(), logp_T[start:stop].tolist())


def draw(run: RunData, decode: Decode | None) -> str:
    """Return the table of a run's newest dumped step; "" if there is none."""
    dump = newest_step(run.path)
    if dump is None:
        return ""
    try:
        rows = read(dump)
    except ConfigError:  # a share is incomplete after a crash
        return ""
    cells = [_cells(row, decode) for row in rows[:MOST_ROWS]]
    caption = f"{run.name}: demonstrations of step {dump.step}, {len(cells)} of {len(rows)}, largest loss first"
    return tables.table(HEAD, cells, caption, wraps=True)


def _cells(row: Demonstration, decode: Decode | None) -> tuple[object, ...]:
    text = decode or (lambda token: f"[{token}]")
    lowest = min(range(len(row.logp)), key=row.logp.__getitem__)
    response = "".join(map(text, row.tokens))
    return row.line, row.turn, len(row.tokens), row.loss, text(row.tokens[lowest]), row.logp[lowest], response

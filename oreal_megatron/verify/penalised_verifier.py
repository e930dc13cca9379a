"""Verdicts with penalties: each rank checks its share of the rollouts once they are graded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from oreal_megatron.algo import response_penalties
from oreal_megatron.config import PenaltyConfig
from oreal_megatron.protocols import Verifier
from oreal_megatron.records import Rollout, Verdict
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)
SHOWN_CHARACTERS = 200  # of the first example of each kind


class PenalisedVerifier:
    """A Verifier of the loop whose verdicts name the penalty of each response (algo/response_penalties.py)."""

    def __init__(self, verifier: Verifier, config: PenaltyConfig) -> None:
        self.verifier, self.config = verifier, config
        self.shown: set[str] = set()  # kinds with an example in the log

    def submit(self, rollout: Rollout) -> None:
        """Start grading one rollout of this rank."""
        self.verifier.submit(rollout)

    def verdicts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
        """Return [P, K] verdicts with penalties on every rank. Collective."""
        table = self.verifier.verdicts(rollouts)
        flat = [rollout for row in rollouts for rollout in row]
        share = flat[distributed.rank() :: distributed.world_size()]
        penalties = {rollout.key: response_penalties.find_penalty(rollout, self.config) for rollout in share}
        named = {key: name for part in distributed.all_gather_object(penalties) for key, name in part.items()}
        self._show_examples(flat, named)
        return [
            [
                dataclasses.replace(verdict, penalty=named[rollout.key])
                for rollout, verdict in zip(row, judged, strict=True)
            ]
            for row, judged in zip(rollouts, table, strict=True)
        ]

    def _show_examples(self, rollouts: Sequence[Rollout], penalties: dict[tuple[int, int], str]) -> None:
        """Log the end of the first response of each kind, on the first rank; all are in the run folder."""
        for rollout in rollouts:
            kind = penalties[rollout.key]
            if kind and kind not in self.shown:
                self.shown.add(kind)
                if distributed.rank() == 0:
                    log.info("first response penalised for %s ends with %r", kind, rollout.text[-SHOWN_CHARACTERS:])

"""Verdicts with penalties: each rank checks the rollouts of its replica once they are graded.

The perplexity needs log-probs of the reference, one more forward pass over the responses that are not penalised yet.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from oreal_megatron.algo import packing, response_penalties
from oreal_megatron.algo.packing import RolloutKey
from oreal_megatron.config import PenaltyConfig
from oreal_megatron.protocols import Scorer, Verifier
from oreal_megatron.records import Outcome, PackingSpec, Rollout, Sample, Verdict
from oreal_megatron.runtime import distributed, heartbeat, rollout_exchange
from oreal_megatron.runtime.remote_values import is_local

log = logging.getLogger(__name__)
SHOWN_CHARACTERS = 200  # of the first example of each kind


class PenalisedVerifier:
    """A Verifier of the loop whose verdicts name the penalty of each response (algo/response_penalties.py)."""

    def __init__(self, verifier: Verifier, config: PenaltyConfig, reference: Scorer, packing_spec: PackingSpec) -> None:
        self.verifier, self.config = verifier, config
        self.reference, self.packing_spec = reference, packing_spec
        self.shown: set[str] = set()  # kinds with an example in the log

    def submit(self, rollout: Rollout) -> None:
        """Start grading one rollout of this rank."""
        self.verifier.submit(rollout)

    def verdicts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
        """Return [P, K] verdicts with penalties on every rank. Collective."""
        table = self.verifier.verdicts(rollouts)
        flat = [rollout for row in rollouts for rollout in row]
        own = [rollout for rollout in flat if is_local(rollout.tokens)]
        penalties = {rollout.key: response_penalties.find_penalty(rollout, self.config) for rollout in own}
        named = {key: name for part in distributed.all_gather_object(penalties) for key, name in part.items()}
        if self.config.perplexity:
            judged = [verdict for row in table for verdict in row]
            named |= dict.fromkeys(self._improbable(flat, judged, named), "perplexity")
        self._show_examples(flat, named)
        return [
            [
                dataclasses.replace(verdict, penalty=named[rollout.key])
                for rollout, verdict in zip(row, judged, strict=True)
            ]
            for row, judged in zip(rollouts, table, strict=True)
        ]

    def _improbable(
        self, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], named: dict[RolloutKey, str]
    ) -> list[RolloutKey]:
        """Return the rollouts with a known verdict and no penalty whose perplexity is above the limit. Collective."""
        samples = [
            Sample(rollout.prompt.tokens, rollout.tokens, 0.0, 0.0, rollout=rollout.key)
            for rollout, verdict in zip(rollouts, verdicts, strict=True)
            if verdict.outcome is not Outcome.UNKNOWN and not named[rollout.key] and rollout.tokens
        ]
        if not samples:
            return []
        samples = rollout_exchange.fetch(samples, packing.own_numbers(samples, self.packing_spec))
        batch = packing.batch(samples, self.packing_spec)
        with heartbeat.phase("reference"):
            sums = packing.sums_by_rollout(self.reference.score(batch) or (), batch.micro_batches)
        logp_sum = {key: value for part in distributed.all_gather_object(sums) for key, value in part.items()}
        limit = self.config.perplexity
        return [
            sample.rollout
            for sample in samples
            if response_penalties.is_improbable(logp_sum[sample.rollout], len(sample.response_tokens), limit)
        ]

    def _show_examples(self, rollouts: Sequence[Rollout], penalties: dict[RolloutKey, str]) -> None:
        """Log the end of the first response of each kind, on the first rank. Collective. All are in the run folder."""
        first: dict[str, Rollout] = {}
        for rollout in rollouts:
            if (kind := penalties[rollout.key]) and kind not in self.shown:
                first.setdefault(kind, rollout)
        if not first:
            return
        self.shown |= first.keys()
        own = {kind: rollout.text[-SHOWN_CHARACTERS:] for kind, rollout in first.items() if is_local(rollout.text)}
        ends = {kind: end for part in distributed.gather_object(own) for kind, end in part.items()}
        for kind in (kind for kind in first if kind in ends):
            log.info("first response penalised for %s ends with %r", kind, ends[kind])

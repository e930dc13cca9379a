"""Speculative decoding that changes no token: drafts save passes of the model, and plain sampling decides.

vLLM's rejection sampling keeps the distribution, but not the tokens: how many random numbers a request has used
depends on its drafts, and these on preemptions, on the batch and, with suffix trees, on other responses. A rollout is a
function of (seed, step, prompt, index) here, so `ExactSampler` takes its place: position by position it samples with
vLLM's plain sampler, from the request's generator, and continues behind a draft only if it is the sampled token.
For drafts without probabilities both accept a draft with the probability that the policy gives it.

It also avoids a fault of vLLM 0.31 on CPUs: there rejection sampling divides logits by temperatures that were never
written (`_expand_kernel_impl` fills a copy), so that sampled tokens have a wrong distribution.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn
from vllm import LLM
from vllm.utils.import_utils import has_arctic_inference
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from oreal_megatron.config import ConfigError, SpeculativeConfig

NO_TOKEN = -1  # in vLLM's table of sampled tokens


class ExactSampler(nn.Module):
    """Replacement of vLLM's RejectionSampler; counts drafted and accepted tokens."""

    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.sampler = sampler
        self.drafted = self.accepted = 0

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,  # [drafts + B, V], of each request the rows of its drafts and of the token behind them
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return [B, most drafts + 1] tokens as plain sampling gives them, NO_TOKEN behind the first other draft."""
        counts = metadata.num_draft_tokens
        ends = torch.tensor(counts).cumsum(0).tolist()
        drafted = metadata.draft_token_ids.tolist()
        drafts = [drafted[end - count : end] for count, end in zip(counts, ends, strict=True)]
        first_rows = [end - count + request for request, (count, end) in enumerate(zip(counts, ends, strict=True))]
        growing = list(range(len(counts)))
        columns: list[Tensor] = []
        tables: list[LogprobsTensors] = []
        for depth in range(max(counts) + 1):
            rows = [first + min(depth, count) for first, count in zip(first_rows, counts, strict=True)]
            output = self._sample(logits[rows], sampling_metadata, growing)
            sampled = output.sampled_token_ids[:, 0].tolist()
            column = torch.full((len(counts),), NO_TOKEN, dtype=torch.int32)
            column[growing] = torch.tensor([sampled[request] for request in growing], dtype=torch.int32)
            columns.append(column.to(logits.device))
            if output.logprobs_tensors is not None:
                tables.append(output.logprobs_tensors)
            growing = [r for r in growing if depth < counts[r] and drafts[r][depth] == sampled[r]]
            self.accepted += len(growing)
            if not growing:
                break
        self.drafted += sum(counts)
        return SamplerOutput(torch.stack(columns, 1), _interleave(tables) if tables else None)

    def take_counts(self) -> tuple[int, int]:
        """Return drafted and accepted tokens since the last call."""
        counts = self.drafted, self.accepted
        self.drafted = self.accepted = 0
        return counts

    def _sample(self, logits: Tensor, metadata: SamplingMetadata, growing: list[int]) -> SamplerOutput:
        """Sample a token of every request; those that do not grow use no random number of theirs."""
        generators = {request: metadata.generators[request] for request in growing if request in metadata.generators}
        output: SamplerOutput = self.sampler(logits, dataclasses.replace(metadata, generators=generators))
        return output


def prepare(config: SpeculativeConfig) -> None:
    """Check what drafting needs, and choose vLLM's runner whose sampler can be replaced; before the engine starts."""
    if config.method == "suffix" and not has_arctic_inference():
        raise ConfigError(
            "engine.speculative.method is suffix, which needs the package arctic-inference; it is not installed. "
            "Install it, or set engine.speculative.method=ngram"
        )
    if config.enabled:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def install(llm: LLM) -> ExactSampler:
    """Put an ExactSampler in the place of the engine's rejection sampler."""
    runner: Any = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    if not hasattr(runner, "rejection_sampler"):
        raise ConfigError(
            f"engine.speculative: {type(runner).__name__} of this vLLM has no rejection sampler that can be replaced: "
            'rollouts would depend on their batch; set engine.speculative.method=""'
        )
    runner.rejection_sampler = ExactSampler(runner.sampler)
    return runner.rejection_sampler


def _interleave(tables: list[LogprobsTensors]) -> LogprobsTensors:
    """Join tables of the positions [B, ...] into one whose rows are those of a request after each other."""
    parts = zip(
        *[(table.logprob_token_ids, table.logprobs, table.selected_token_ranks) for table in tables], strict=True
    )
    return LogprobsTensors(*[torch.stack(part, 1).flatten(0, 1) for part in parts])

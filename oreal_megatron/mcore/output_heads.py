"""Output heads on the last pipeline stage: log-probs of action tokens, or the reward model's token scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import oreal_kernels
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from oreal_megatron.algo import importance, loss
from oreal_megatron.config import LossConfig
from oreal_megatron.mcore import context_parallel, layers
from oreal_megatron.records import Counts, MicroBatch


class ScalarHead(nn.Module):
    """Linear(H, 1) in place of Megatron's output layer; every tensor-parallel rank holds all of it.

    The hidden states it reads are equal on all tensor-parallel ranks, hence so is its gradient: nothing to reduce.
    With sequence parallelism each rank reads its own rows: scores are gathered, and gradients are marked to be summed.
    """

    def __init__(self, hidden: int, dtype: torch.dtype, sequence_parallel: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden, dtype=dtype))
        self.sequence_parallel = sequence_parallel
        layers.mark_sequence_parallel(self.weight, sequence_parallel)

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Return scores [S, 1, 1] of hidden states [S, 1, H], and no bias."""
        scores = nn.functional.linear(hidden, self.weight)
        if self.sequence_parallel:  # every rank computes the same loss and takes the gradient of its own rows
            scores = tensor_parallel.gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the weight to Megatron's checkpoints."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


class PassThroughOutput(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer with its parameters, returning hidden states: the fused head multiplies them."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the hidden states unchanged, and no bias."""
        return hidden, None


class LanguageModelHead:
    """Fused vocabulary-parallel operations on hidden states [1, S, H] of the last pipeline stage.

    S is this rank's share under sequence or context parallelism. Log-probs and loss are of the distribution
    that responses are sampled from, softmax(logits / temperature).
    """

    def __init__(self, model: GPTModel, vocab_size: int, budget_bytes: int, temperature: float = 1.0):
        self.model, self.vocab_size, self.budget_bytes, self.temperature = model, vocab_size, budget_bytes, temperature

    def log_probs(self, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return the [T] log-probs of the action tokens."""
        own, index = context_parallel.own_actions(micro_batch, micro_batch.action_index)
        logp, _ = oreal_kernels.linear_logprob(*self._inputs(hidden, own), **self._options(own))
        return context_parallel.combine_values(logp, index, len(micro_batch.labels))

    def oreal_loss(
        self,
        hidden: Tensor,
        micro_batch: MicroBatch,
        reference_logp_T: Tensor,
        weight_T: Tensor,
        counts: Counts,
        config: LossConfig,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return OREAL's loss and metrics; its gradient is computed at once, the weight's into Megatron's buffer.

        The loss is a plain sum over action tokens, so context-parallel ranks compute their own tokens only.
        """
        own, index = context_parallel.own_actions(micro_batch, micro_batch.action_index)
        terms = loss.terms(reference_logp_T[index], weight_T[index], own, counts, config)
        # Megatron's schedules pass the gradient 1 to every loss, because no grad_scale_func is set.
        fused = oreal_kernels.linear_oreal_loss
        result = fused(*self._inputs(hidden, own), terms, loss_scale=1.0, **self._options(own))
        total, sums, entropy = map(
            context_parallel.sum_over_ranks, (result.loss, result.sums, result.entropy.sum(dtype=torch.float64))
        )
        metrics = loss.metrics(total, sums, counts, config)
        metrics["policy/entropy"] = entropy / max(counts.action_tokens, 1)
        if config.ratio_cap:
            ratios = importance.metrics(result.logp, own, counts.incorrect_tokens, config)
            metrics |= {name: context_parallel.sum_over_ranks(value) for name, value in ratios.items()}
        return result.loss, metrics

    def loss_with_term(
        self,
        hidden: Tensor,
        micro_batch: MicroBatch,
        reference_logp_T: Tensor,
        weight_T: Tensor,
        counts: Counts,
        config: LossConfig,
        term: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return OREAL's loss plus `term` of the log-probs [T], and metrics, differentiated by torch.

        Every context-parallel rank computes the loss of all tokens, and takes the gradient of its own.
        """
        own, index = context_parallel.own_actions(micro_batch, micro_batch.action_index)
        values = oreal_kernels.linear_logprob(*self._inputs(hidden, own), **self._options(own))
        logp_T, entropy_T = (context_parallel.combine_values(v, index, len(micro_batch.labels)) for v in values)
        terms = loss.terms(reference_logp_T, weight_T, micro_batch, counts, config)
        total, sums = oreal_kernels.oreal_loss(logp_T, dataclasses.replace(terms, entropy_coef=0.0))
        if terms.entropy_coef:
            total = total - terms.entropy_scale * entropy_T.sum()
        metrics = loss.metrics(total, sums, counts, config)
        metrics["policy/entropy"] = entropy_T.detach().sum(dtype=torch.float64) / max(counts.action_tokens, 1)
        if config.ratio_cap:
            metrics |= importance.metrics(logp_T, micro_batch, counts.incorrect_tokens, config)
        if len(logp_T):  # means over no token would be nan
            value, own_metrics = term(logp_T)
            total = total + value
            metrics |= own_metrics | {"loss/total": total.detach(), "loss/term": value.detach()}
        return total, metrics

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [1, S, V/tp] logits of this rank's rows, padding included, not divided; for comparisons only."""
        return nn.functional.linear(hidden, self.weight)

    @property
    def weight(self) -> nn.Parameter:
        """Rows of the output layer on this rank, or of the embedding that it shares."""
        if self.model.share_embeddings_and_output_weights:
            return self.model.shared_embedding_or_output_weight()
        return self.model.output_layer.weight

    def _inputs(self, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        return hidden.flatten(0, 1), self.weight, micro_batch.labels

    def _options(self, micro_batch: MicroBatch) -> dict[str, Any]:
        return dict(
            rows=micro_batch.action_index,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.model.config.sequence_parallel,
            budget_bytes=self.budget_bytes,
            main_grad=getattr(self.weight, "main_grad", None),
        )


def token_scores(scores: Tensor, micro_batch: MicroBatch, score_at: str) -> Tensor:
    """Return [T] scores of the action tokens, from after reading each token or before it; scores [1, S / cp, 1]."""
    rows = micro_batch.action_index + (1 if score_at == "token" else 0)
    own, index = context_parallel.own_actions(micro_batch, rows)
    score = scores.flatten().index_select(0, own.action_index).float()
    return context_parallel.combine_values(score, index, len(rows))

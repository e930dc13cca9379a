"""What comes out of the last pipeline stage: log-probs of action tokens, or the reward model's token scores."""

from __future__ import annotations

import oreal_kernels
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from oreal_megatron.records import MicroBatch


class ScalarHead(nn.Module):
    """Linear(H, 1) in place of Megatron's output layer; every tensor-parallel rank holds all of it.

    The hidden states it reads are equal on all tensor-parallel ranks, hence so is its gradient: nothing to reduce.
    """

    def __init__(self, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden, dtype=dtype))

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return nn.functional.linear(hidden, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


class _VocabParallelLogProb(torch.autograd.Function):
    """Log-probs [T] from this rank's logits [T, V/tp]; one all-gather of [3, T] forward."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, vocab_size: int):
        group = parallel_state.get_tensor_model_parallel_group()
        start = group.rank() * logits.shape[1]
        mine = oreal_kernels.statistics(logits, labels, start, vocab_size)
        parts = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather(list(parts.unbind(0)), mine, group=group)
        logp, log_sum_exp = oreal_kernels.combine(parts)
        ctx.save_for_backward(logits, labels, log_sum_exp)
        ctx.slice = (start, vocab_size)
        return logp

    @staticmethod
    def backward(ctx, grad_logp: Tensor):
        return oreal_kernels.gradient(*ctx.saved_tensors, grad_logp, *ctx.slice), None, None


def log_probs(logits: Tensor, micro_batch: MicroBatch, vocab_size: int) -> Tensor:
    """[T] log-prob of each action token, from logits [B, S, V/tp]."""
    rows = logits.flatten(0, 1).index_select(0, micro_batch.action_index)
    return _VocabParallelLogProb.apply(rows, micro_batch.labels, vocab_size)


def token_scores(scores: Tensor, micro_batch: MicroBatch, score_at: str) -> Tensor:
    """[T] reward-model score of each action token, after reading it or before; scores [B, S, 1]."""
    index = micro_batch.action_index + (1 if score_at == "token" else 0)
    return scores.flatten().index_select(0, index).float()

"""Terms of a teacher's logits in distillation, a few rows at a time, with the vocabulary split over ranks.

    pearson_logits:  1 - Pearson correlation over the step's tokens, mean over the vocabulary (feature_imitation.py)
    kl_logits:       tau^2 mean_t KL(softmax(y_t / tau) || softmax(x_t / tau))     teacher y, student x

Gradients are computed in the forward, where the logits are; the teacher's are made again from its last hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from oreal_kernels.vocab_head import InputGradient, VocabHead, VocabShard, WeightGradient, gather_inputs, row_chunks
from torch import Tensor

from oreal_megatron.algo import feature_imitation as imitation
from oreal_megatron.config import DistillationConfig
from oreal_megatron.mcore import context_parallel
from oreal_megatron.mcore.gpt_model import device
from oreal_megatron.mcore.output_heads import LanguageModelHead
from oreal_megatron.records import Batch, MicroBatch

if TYPE_CHECKING:  # they import this module
    from oreal_megatron.mcore.distillation import Term
    from oreal_megatron.mcore.trained_models import Policy, Reference

# Logits [n, V'] of student and teacher -> this rank's part of the loss, and its gradient [n, V'] by the student's.
Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Of a chunk of rows, whose slice it receives.
CompareRows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def logit_term(student: Policy, teacher: Reference, batch: Batch, config: DistillationConfig) -> Iterator[Term]:
    """Return the term of a step. Collective."""
    model, teacher_model, tokens = student.language_model, teacher.language_model, batch.counts.action_tokens
    inputs = teacher.read_outputs(batch, lambda hidden, part: _rows(teacher_model, hidden, part)) or []
    pearson, metrics = config.objective == "pearson_logits", {}
    with teacher.parts.on_device("parameters", read_only=True):
        if pearson:
            channels = _statistics(student, teacher_model, batch, inputs)
            metrics = _pearson_metrics(channels, model.vocab_size)

        def term(number: int, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            own, _ = context_parallel.own_actions(micro_batch, micro_batch.action_index)
            heads = [
                _vocab_head(lm, own.labels, 1.0 if pearson else config.temperature) for lm in (model, teacher_model)
            ]

            def compare(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
                goal = heads[1].logits(inputs[number], chunk)
                if pearson:
                    return _pearson(logits, goal, channels, heads[0].columns, tokens, model.vocab_size)
                return _kl(logits, goal, heads, chunk, config.temperature, tokens)

            value = _imitate(model, hidden, own, heads[0], compare)
            if pearson:
                share = 1 / parallel_state.get_data_parallel_world_size() if number == 0 else 0.0
                return value, {name: metric * share for name, metric in metrics.items()}
            return value, {"loss/distillation": context_parallel.sum_over_ranks(value)}

        yield term


class _LogitImitation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: VocabHead, compare: CompareRows, rows: Tensor, options: Any
    ) -> Tensor:
        main_grad, sequence_parallel, budget_bytes = options
        x = gather_inputs(hidden, rows, head.group if sequence_parallel else None)
        dhidden, dweight = InputGradient(x, head, sequence_parallel), WeightGradient(weight, None)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for chunk in row_chunks(len(x), head.plan("recompute", budget_bytes // 4).chunk_rows):
            value, dlogits = compare(head.logits(x, chunk), chunk)
            total += value
            dhidden.add(dlogits.to(x.dtype), chunk)
            dweight.add(dlogits.to(x.dtype), x[chunk])
        ctx.dhidden, ctx.dweight, ctx.main_grad = dhidden.result(rows, hidden), dweight, main_grad
        dist.all_reduce(total, group=head.group)
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.dhidden * gradient, ctx.dweight.result(ctx.main_grad, gradient), None, None, None, None


def _imitate(
    model: LanguageModelHead, hidden: Tensor, own: MicroBatch, head: VocabHead, compare: CompareRows
) -> Tensor:
    """Return the sum of a comparison over this rank's action tokens, differentiable."""
    options = getattr(model.weight, "main_grad", None), model.model.config.sequence_parallel, model.budget_bytes
    arguments = (hidden.flatten(0, 1), model.weight, head, compare, own.action_index, options)
    return _LogitImitation.apply(*arguments)


def _pearson(
    logits: Tensor, goal: Tensor, channels: imitation.Statistics, columns: int, tokens: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    gradient = torch.zeros_like(logits)
    gradient[:, :columns] = imitation.pearson_gradient(logits[:, :columns], goal[:, :columns], channels, tokens)
    return logits.new_zeros(()), gradient / vocabulary  # the loss is a function of the statistics


def _kl(
    logits: Tensor, goal: Tensor, heads: Sequence[VocabHead], chunk: slice, temperature: float, tokens: int
) -> tuple[Tensor, Tensor]:
    log_p, log_q = (_log_probs(head, values, chunk) for head, values in zip(heads, (logits, goal), strict=True))
    q = log_q.exp()
    gradient = torch.zeros_like(logits)
    gradient[:, : heads[0].columns] = temperature * (log_p.exp() - q) / max(tokens, 1)
    return temperature**2 * (q * (log_q - log_p)).sum(dtype=torch.float64) / max(tokens, 1), gradient


def _log_probs(head: VocabHead, logits: Tensor, chunk: slice) -> Tensor:
    """Return log-probs [n, columns] of this rank's part of the vocabulary. Collective."""
    combined = head.combine_ranks(head.statistics(logits, chunk))
    scaled = logits[:, : head.columns].float() * head.inverse_temperature[chunk, None]
    return scaled - combined.statistics[0][:, None] - combined.log_total[:, None]


def _statistics(
    student: Policy, teacher: LanguageModelHead, batch: Batch, inputs: Sequence[Tensor]
) -> imitation.Statistics:
    """Return the statistics of this rank's part of the vocabulary over the step, from a forward pass. Collective."""
    model, remaining = student.language_model, iter(inputs)

    def moments(hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        own, _ = context_parallel.own_actions(micro_batch, micro_batch.action_index)
        heads = [_vocab_head(lm, own.labels, 1.0) for lm in (model, teacher)]
        x, y = _rows(model, hidden, micro_batch), next(remaining)
        sums = torch.zeros(5, heads[0].columns, dtype=torch.float64, device=x.device)
        for chunk in row_chunks(len(x), heads[0].plan("recompute", model.budget_bytes // 4).chunk_rows):
            pair = [head.logits(values, chunk)[:, : head.columns] for head, values in zip(heads, (x, y), strict=True)]
            sums += imitation.moments(*pair)
        return sums

    sums = torch.stack(student.read_outputs(batch, moments) or [torch.zeros(5, 0, device=device())]).sum(0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return imitation.statistics(sums, batch.counts.action_tokens)


def _pearson_metrics(channels: imitation.Statistics, vocabulary: int) -> dict[str, Tensor]:
    sums = torch.stack(
        [imitation.pearson_loss(channels), channels.correlation.sum(), (~channels.varies).sum().double()]
    )
    dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    names = ("loss/distillation", "distillation/correlation", "distillation/constant_channels")
    scales = (vocabulary, vocabulary, 1)
    return {name: value / scale for name, value, scale in zip(names, sums, scales, strict=True)}


def _rows(model: LanguageModelHead, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the last hidden states [n, H] of this rank's action tokens, gathered under sequence parallelism."""
    own, _ = context_parallel.own_actions(micro_batch, micro_batch.action_index)
    group = parallel_state.get_tensor_model_parallel_group() if model.model.config.sequence_parallel else None
    return gather_inputs(hidden.flatten(0, 1), own.action_index, group)


def _vocab_head(model: LanguageModelHead, labels: Tensor, temperature: float) -> VocabHead:
    group = parallel_state.get_tensor_model_parallel_group()
    shard = VocabShard.of_rank(len(model.weight), model.vocab_size, None, group)
    return shard.head(model.weight, labels, temperature, 0.0, group, torch.float32)

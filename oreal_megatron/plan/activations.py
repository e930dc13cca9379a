"""Bytes of activations: what autograd keeps for the backward of one model on one rank, and what it works on besides.

Counted tensor by tensor for the layers that mcore/ builds, on a GPU: Megatron's local layer with our norms and packed
attention, no fused SwiGLU. tests/dist/test_rehearse.py compares with what autograd keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oreal_megatron.config import Config, ParallelConfig
from oreal_megatron.models.architecture import Architecture

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Rows:
    """How a micro-batch of `tokens` lies on a rank."""

    tokens: float  # of the micro-batch
    own: float  # after context parallelism
    residual: float  # in norms and residuals, which sequence parallelism cuts as well

    @classmethod
    def of(cls, tokens: float, cut: ParallelConfig) -> Rows:
        own = tokens / cut.context
        return cls(tokens, own, own / (cut.tensor if cut.sequence else 1))


def of_layer(arch: Architecture, cut: ParallelConfig, rows: Rows, itemsize: int, attention: bool = True) -> float:
    """Kept by one layer of which nothing is computed again; without `attention`, its core is."""
    queries, keys = arch.heads * arch.head_dim / cut.tensor, arch.kv_groups * arch.head_dim / cut.tensor
    ffn = arch.ffn / cut.tensor * (arch.experts.per_token if arch.experts else 1)
    norms = rows.residual * (4 * arch.hidden * itemsize + 2 * 4)  # two inputs, two outputs, two scales
    rotary = rows.own * 4 * arch.head_dim * itemsize  # sine and cosine, of queries and of keys
    core = rows.own * 2 * queries * itemsize  # queries and what attention gives
    if attention:
        core += rows.tokens * 2 * keys * itemsize + rows.own * arch.heads / cut.tensor * 4
    else:
        core += rows.own * (queries + 3 * keys) * itemsize  # what the product gave, whole, for a view of it
    gate = rows.own * 5 * ffn * itemsize  # gate and up, the gate's SiLU, up plus an offset of zero, the product
    return norms + rotary + core + gate


def in_flight(cut: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches, as many layers each as the rank holds, whose activations wait for their backward at once.

    Stock schedules of Megatron-core: 1F1B, and interleaved, where a chunk's activations are a share of them.
    """
    if cut.virtual == 1:
        return min(cut.pipeline - stage, micro_batches)
    warm_up = 2 * (cut.pipeline - stage - 1) + (cut.virtual - 1) * cut.pipeline
    return min(warm_up + 1, micro_batches * cut.virtual) / cut.virtual


def kept(arch: Architecture, config: Config, stage: int, tokens: float, micro_batches: int) -> float:
    """Kept by one rank of a pipeline stage at the most, when every micro-batch has `tokens`."""
    cut, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    rows, layers = Rows.of(tokens, cut), arch.layers // cut.pipeline
    residual = rows.residual * arch.hidden * itemsize
    whole = of_layer(arch, cut, rows, itemsize)
    granularity = config.megatron.get("recompute_granularity")
    if granularity == "full":
        again = config.megatron.get("recompute_num_layers") or 1
        if config.megatron.get("recompute_method") == "block":
            again = min(again * cut.virtual, layers)  # the first ones, whose backward comes last
            waiting, working = again * residual + (layers - again) * whole, whole if again == layers else 0.0
        else:
            waiting, working = layers / again * residual, again * whole - residual  # whose input waits already
    elif granularity == "selective":
        waiting, working = layers * of_layer(arch, cut, rows, itemsize, attention=False), 0.0
    else:
        waiting, working = layers * whole, 0.0
    ends = residual  # what goes to the next stage, or into the head
    return in_flight(cut, stage, micro_batches) * (waiting + ends) + working


def kept_of(arch: Architecture, config: Config, stage: int, tokens: Sequence[int]) -> float:
    """The same for micro-batches of these sizes, when the largest of them meet."""
    meeting = math.ceil(in_flight(config.parallel, stage, len(tokens)))
    largest = sorted(tokens)[-meeting:]
    return kept(arch, config, stage, sum(largest) / len(largest), len(tokens))


def working(arch: Architecture, config: Config, tokens: int) -> float:
    """What the widest layer has on the device besides, forward or backward: whole rows and both halves of its gate."""
    cut, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    rows = Rows.of(tokens, cut)
    ffn = arch.ffn / cut.tensor * (arch.experts.per_token if arch.experts else 1)
    return itemsize * rows.own * (2 * arch.hidden + 4 * ffn)


def head(arch: Architecture, config: Config, tokens: int) -> float:
    """The output layer's: logits of some rows at a time, the rows that have a label, and the gradient of both."""
    cut, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    own = Rows.of(tokens, cut).own
    logits = 2 * itemsize * own * arch.padded_vocab(cut.tensor) / cut.tensor
    return min(logits, config.model.logits_mib * 2**20) + 3 * own * arch.hidden * itemsize

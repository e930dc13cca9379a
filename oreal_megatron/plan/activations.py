"""Bytes of activations: saved for the backward of one model on one rank, and used temporarily.

Counted tensor by tensor for the layers that mcore/ builds on a GPU: Megatron's local layer with the norms and packed
attention of this project, no fused SwiGLU. tests/dist/test_rehearse.py compares with what autograd saves.
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
    """Number of rows of a micro-batch on one rank."""

    tokens: float  # of the micro-batch
    local: float  # after context parallelism
    residual: float  # in norms and residuals, which sequence parallelism splits as well

    @classmethod
    def from_layout(cls, tokens: float, layout: ParallelConfig) -> Rows:
        """Split the tokens of a micro-batch over the ranks of a layout."""
        local = tokens / layout.context
        return cls(tokens, local, local / (layout.tensor if layout.sequence else 1))


def layer_bytes(arch: Architecture, layout: ParallelConfig, rows: Rows, itemsize: int, attention: bool = True) -> float:
    """Return what one layer saves without recomputation; `attention=False`: its core is recomputed."""
    queries, keys = arch.heads * arch.head_dim / layout.tensor, arch.kv_groups * arch.head_dim / layout.tensor
    ffn = arch.ffn / layout.tensor * (arch.experts.per_token if arch.experts else 1)
    norms = rows.residual * (4 * arch.hidden * itemsize + 2 * 4)  # two inputs, two outputs, two scales
    rotary = rows.local * 4 * arch.head_dim * itemsize  # sine and cosine, of queries and of keys
    core = rows.local * 2 * queries * itemsize  # queries and output of attention
    if attention:
        core += rows.tokens * 2 * keys * itemsize + rows.local * arch.heads / layout.tensor * 4
    else:
        core += rows.local * (queries + 3 * keys) * itemsize  # the whole output of the product, for a view of it
    gate = rows.local * 5 * ffn * itemsize  # gate and up, the gate's SiLU, up plus an offset of zero, the product
    return norms + rotary + core + gate


def in_flight(layout: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Return the micro-batches of all layers of the rank whose activations wait for their backward at once.

    Schedules of Megatron-core: 1F1B, and interleaved, where a chunk holds a part of the layers.
    """
    if layout.virtual == 1:
        return min(layout.pipeline - stage, micro_batches)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline
    return min(warm_up + 1, micro_batches * layout.virtual) / layout.virtual


def saved_bytes(arch: Architecture, config: Config, stage: int, tokens: float, micro_batches: int) -> float:
    """Return what one rank of a pipeline stage saves at most, if every micro-batch has `tokens` tokens."""
    layout, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    rows, layers = Rows.from_layout(tokens, layout), arch.layers // layout.pipeline
    residual = rows.residual * arch.hidden * itemsize
    layer = layer_bytes(arch, layout, rows, itemsize)
    granularity = config.megatron.get("recompute_granularity")
    if granularity == "full":
        again = config.megatron.get("recompute_num_layers") or 1
        if config.megatron.get("recompute_method") == "block":
            again = min(again * layout.virtual, layers)  # the first layers: their backward comes last
            waiting, working = again * residual + (layers - again) * layer, layer if again == layers else 0.0
        else:
            waiting, working = layers / again * residual, again * layer - residual  # its input is counted already
    elif granularity == "selective":
        waiting, working = layers * layer_bytes(arch, layout, rows, itemsize, attention=False), 0.0
    else:
        waiting, working = layers * layer, 0.0
    ends = residual  # output to the next stage or the head
    return in_flight(layout, stage, micro_batches) * (waiting + ends) + working


def saved_bytes_for(arch: Architecture, config: Config, stage: int, tokens: Sequence[int]) -> float:
    """Return the same for micro-batches of these sizes, if the largest are in flight together."""
    concurrent = math.ceil(in_flight(config.parallel, stage, len(tokens)))
    largest = sorted(tokens)[-concurrent:]
    return saved_bytes(arch, config, stage, sum(largest) / len(largest), len(tokens))


def temporary_bytes(arch: Architecture, config: Config, tokens: int) -> float:
    """Return what the widest layer uses temporarily, forward or backward: full rows and both halves of its gate."""
    layout, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    rows = Rows.from_layout(tokens, layout)
    ffn = arch.ffn / layout.tensor * (arch.experts.per_token if arch.experts else 1)
    return itemsize * rows.local * (2 * arch.hidden + 4 * ffn)


def head_bytes(arch: Architecture, config: Config, tokens: int) -> float:
    """Return what the output layer uses: logits of some rows at a time, rows with a label, and their gradients."""
    layout, itemsize = config.parallel, ITEMSIZE[config.model.dtype]
    local = Rows.from_layout(tokens, layout).local
    logits = 2 * itemsize * local * arch.padded_vocab(layout.tensor) / layout.tensor
    return min(logits, config.model.logits_mib * 2**20) + 3 * local * arch.hidden * itemsize

"""Floating-point operations of a model, counted here alone: for planning, for packing and for the speed report.

A product of [m, k] and [k, n] is 2 m k n operations. Norms, rotations, softmax and activations are not counted, as is
usual (PaLM, arXiv 2204.02311, appendix B); causal attention is counted as half of the full square, as Megatron's and
NeMo-RL's formulas do.
"""

from __future__ import annotations

from collections.abc import Sequence

from oreal_megatron.models.architecture import Architecture


def layer_elements(arch: Architecture) -> int:
    """Elements of the matrices that a token is multiplied with in all layers; of experts, those that are picked."""
    picked, router = (arch.experts.per_token, arch.experts.count) if arch.experts else (1, 0)
    blocks = arch.hidden * (3 * arch.ffn * picked + router)
    attention = 2 * arch.hidden * arch.head_dim * (arch.heads + arch.kv_groups)
    return arch.layers * (blocks + attention)


def head_elements(arch: Architecture, head: str = "lm") -> int:
    """Elements of the output layer, "lm" or "scalar"."""
    return arch.hidden * (arch.vocab if head == "lm" else 1)


def attention_elements(arch: Architecture) -> int:
    """Elements of a token's queries in all layers: its scores, and the sum of values, each are 2 x these a key."""
    return arch.layers * arch.heads * arch.head_dim


def matrices(arch: Architecture) -> int:
    """All elements that a token is multiplied with in a language model: the parameters but for embedding and norms."""
    return layer_elements(arch) + head_elements(arch)


def even_tokens(arch: Architecture) -> float:
    """The length at which a sequence's causal attention costs as many operations as its matrix products."""
    return matrices(arch) / attention_elements(arch)


def forward(arch: Architecture, lengths: Sequence[float], rows: float, head: str = "lm") -> float:
    """Operations of one pass forward over sequences of so many tokens each, `rows` of which reach the head. A pass
    backward takes twice as many."""
    products = layer_elements(arch) * sum(lengths) + head_elements(arch, head) * rows
    squares = sum(length * length for length in lengths)
    return 2 * products + 4 * attention_elements(arch) * squares / 2

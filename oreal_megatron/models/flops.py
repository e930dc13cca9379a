"""Floating-point operations of a model: the only count, for planning, packing and the speed report.

A product of [m, k] and [k, n] is 2 m k n operations. Norms, rotations, softmax and activations are not counted, as is
usual (PaLM, arXiv 2204.02311, appendix B). Causal attention counts as half of the full square, as in the formulas of
Megatron and NeMo-RL.
"""

from __future__ import annotations

from collections.abc import Sequence

from oreal_megatron.models.architecture import Architecture


def layer_elements(arch: Architecture) -> int:
    """Return the elements of the matrices that a token is multiplied with in all layers; only of selected experts."""
    selected, router = (arch.experts.per_token, arch.experts.count) if arch.experts else (1, 0)
    blocks = arch.hidden * (3 * arch.ffn * selected + router)
    attention = 2 * arch.hidden * arch.head_dim * (arch.heads + arch.kv_groups)
    return arch.layers * (blocks + attention)


def head_elements(arch: Architecture, head: str = "lm") -> int:
    """Return the elements of the output layer; `head` is "lm" or "scalar"."""
    return arch.hidden * (arch.vocab if head == "lm" else 1)


def attention_elements(arch: Architecture) -> int:
    """Return the elements of a token's queries in all layers; scores and value sums each take 2 x these per key."""
    return arch.layers * arch.heads * arch.head_dim


def matrix_elements(arch: Architecture) -> int:
    """Return all elements that a token is multiplied with in a language model: parameters minus embedding and norms."""
    return layer_elements(arch) + head_elements(arch)


def even_tokens(arch: Architecture) -> float:
    """Return the length at which a sequence's causal attention costs as many operations as its matrix products."""
    return matrix_elements(arch) / attention_elements(arch)


def forward(arch: Architecture, lengths: Sequence[float], rows: float, head: str = "lm") -> float:
    """Return the operations of a forward pass over sequences of these lengths, `rows` of which reach the head.

    A backward pass takes twice as many.
    """
    products = layer_elements(arch) * sum(lengths) + head_elements(arch, head) * rows
    squares = sum(length * length for length in lengths)
    return 2 * products + 4 * attention_elements(arch) * squares / 2

"""Native CPU library (kernels/csrc), loaded with ctypes: thin wrappers that check tensors and pass pointers.

The library is optional. Where it was not built, `available()` is False and one warning says so. Tensors are on the CPU;
results are the same bits for any number of torch threads. Wrong shapes raise ValueError, wrong dtypes TypeError, and
each function RuntimeError where the library is missing.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("liboreal_kernels.so")
ABI_VERSION = 3
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
# One letter per argument: p pointer, n int64, i int, f float, s string; the result comes first, - is none.
SIGNATURES = {
    "oreal_abi_version": "i",
    "oreal_features": "s",
    "oreal_select": "is",
    "oreal_row_statistics": "-pinnnppfpi",
    "oreal_row_gradient": "-pinpinnnnppfpppppi",
    "oreal_token_weights": "-pipnpiffppi",
    "oreal_policy_terms": "-ppppnppifffippi",
    "oreal_add_weight_gradient": "ipnpnpnnnni",
}
C_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "s": ctypes.c_char_p,
    "-": None,
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, or None after one warning where it is missing or of another version."""
    fix = "`pip install --no-build-isolation -e .` builds it where cmake and a C++ compiler are installed"
    if not LIBRARY.exists():
        warnings.warn(f"{LIBRARY.name} was not built, so torch computes instead, more slowly; {fix}", stacklevel=2)
        return None
    library = ctypes.CDLL(str(LIBRARY))
    version = library.oreal_abi_version()
    if version != ABI_VERSION:
        mismatch = f"{LIBRARY.name} has version {version} of its interface; expected {ABI_VERSION}"
        warnings.warn(f"{mismatch}, so torch computes instead, more slowly; {fix}", stacklevel=2)
        return None
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, *function.argtypes = (C_TYPES[letter] for letter in signature)
    return library


def available() -> bool:
    """Return whether the library can be used."""
    return load() is not None


def features() -> str:
    """Return the instruction set in use, such as "avx512 avx512_bf16"."""
    return _library().oreal_features().decode()


def select(instruction_set: str = "") -> None:
    """Select "plain", "avx2" or "avx512", or the best one of this machine for ""; for tests and benchmarks.

    Raises ValueError for an instruction set that this machine lacks.
    """
    if not _library().oreal_select(instruction_set.encode()):
        raise ValueError(f"instruction set {instruction_set!r} is not supported by this machine; it has {features()}")


def row_statistics(
    logits: Tensor, label_column: Tensor, inverse_temperature: Tensor, softcap: float, columns: int
) -> Tensor:
    """Return [4, rows] fp32 statistics of logits [rows, total columns], of which the first `columns` are valid.

    With z = softcap * tanh(logit / softcap) * inverse_temperature [rows] (no cap where softcap is 0): the maximum m,
    the sum of exp(z - m), the sum of exp(z - m) * (z - m), and z at label_column [rows] int64, or 0 where that is
    outside. A row without columns, or of -inf only, gives -inf, 0, 0.
    """
    rows = _matrix("logits", logits, DTYPE_CODES)
    _check_columns(columns, logits)
    _vector("label_column", label_column, torch.int64, rows)
    _vector("inverse_temperature", inverse_temperature, torch.float32, rows)
    out = torch.empty(4, rows, dtype=torch.float32, device="cpu")
    _library().oreal_row_statistics(
        logits.data_ptr(), DTYPE_CODES[logits.dtype], rows, columns, logits.stride(0), label_column.data_ptr(),
        inverse_temperature.data_ptr(), softcap, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def row_gradient(
    logits: Tensor, out: Tensor, label_column: Tensor, inverse_temperature: Tensor, softcap: float, columns: int,
    maximum: Tensor, log_total: Tensor, entropy: Tensor, a: Tensor, b: Tensor,
) -> Tensor:  # fmt: skip
    """Compute out [rows, total columns] = (a * (1[label] - p) - b * p * (log p + entropy)) * dz/dlogit.

    That is a * d(log-prob)/dlogit + b * d(entropy)/dlogit, with log p = z - maximum - log_total and z as in
    `row_statistics`; maximum, log_total, entropy, a and b are fp32 [rows]. Columns from `columns` on, rows with
    a = b = 0 and rows with maximum = -inf become 0. `out` may be `logits` itself, and must not overlap it otherwise.
    """
    rows = _matrix("logits", logits, DTYPE_CODES)
    _matrix("out", out, DTYPE_CODES, logits.shape)
    _check_columns(columns, logits)
    if rows > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"rows of out overlap: {out.shape[1]} columns with a stride of {out.stride(0)}")
    _vector("label_column", label_column, torch.int64, rows)
    per_row = {"inverse_temperature": inverse_temperature, "maximum": maximum, "log_total": log_total}
    for name, values in (per_row | {"entropy": entropy, "a": a, "b": b}).items():
        _vector(name, values, torch.float32, rows)
    _library().oreal_row_gradient(
        logits.data_ptr(), DTYPE_CODES[logits.dtype], logits.stride(0), out.data_ptr(), DTYPE_CODES[out.dtype],
        out.stride(0), rows, columns, logits.shape[1], label_column.data_ptr(), inverse_temperature.data_ptr(), softcap,
        maximum.data_ptr(), log_total.data_ptr(), entropy.data_ptr(), a.data_ptr(), b.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def token_weights(
    scores: Tensor, cu_seqlens: Tensor, correct: Tensor, thresholds: tuple[float, float], prefix_mean: bool
) -> tuple[Tensor, Tensor]:
    """Return weights [T] and mean scores [B], fp32, of scores [T] in B sequences with offsets cu_seqlens [B + 1].

    belief = sigmoid(running mean of the sequence's scores, or the score itself), 1 - belief where correct [B] (bool) is
    False; weight = clamp((belief - threshold) / (1 - threshold), 0, 1), with the first threshold for correct sequences
    and the second for incorrect ones. The mean of an empty sequence is 0.
    """
    tokens = _vector("scores", scores, DTYPE_CODES)
    sequences = _sequences(cu_seqlens, tokens)
    _vector("correct", correct, torch.bool, sequences)
    check_thresholds(thresholds)
    weights, means = (torch.empty(n, dtype=torch.float32, device="cpu") for n in (tokens, sequences))
    _library().oreal_token_weights(
        scores.data_ptr(), DTYPE_CODES[scores.dtype], cu_seqlens.data_ptr(), sequences, correct.data_ptr(), prefix_mean,
        *thresholds, weights.data_ptr(), means.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weights, means


def check_thresholds(thresholds: tuple[float, float]) -> None:
    """Raise ValueError for a threshold that a belief cannot be rescaled with."""
    if not all(threshold < 1 for threshold in thresholds):
        raise ValueError(f"thresholds are {thresholds}; expected numbers below 1: beliefs are divided by 1 - threshold")


def policy_terms(
    logp: Tensor, reference: Tensor, weight: Tensor, cu_seqlens: Tensor, reward: Tensor, advantage: Tensor, *,
    advantage_on_positives: bool, correct_scale: float, incorrect_scale: float, kl_scale: float, kl_kind: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient [T] fp32 of OREAL's policy loss by log-probs [T], and eight unscaled sums fp64.

    A sequence is correct when reward [B] > 0; A is its advantage [B]; w the weights [T]; d = reference - logp, clamped
    to [-60, 60]. gradient = -(correct ? correct_scale * w * (A or 1) : incorrect_scale * w * A) + kl_scale * slope,
    with slope 1 (kind 1), -1 (kind -1, k1 reversed), -d (kind 2) or 1 - exp(d) (kind 3).
    The sums: correct w * (A or 1) * logp; incorrect w * A; -d; d^2 / 2; exp(d) - d - 1; logp; correct w; incorrect w.
    """
    tokens = _vector("logp", logp, torch.float32)
    _vector("reference", reference, torch.float32, tokens)
    _vector("weight", weight, torch.float32, tokens)
    sequences = _sequences(cu_seqlens, tokens)
    _vector("reward", reward, torch.float32, sequences)
    _vector("advantage", advantage, torch.float32, sequences)
    if kl_kind not in (1, -1, 2, 3):
        raise ValueError(f"kl_kind is {kl_kind!r}; expected 1, -1, 2 or 3")
    grad = torch.empty(tokens, dtype=torch.float32, device="cpu")
    sums = torch.empty(8, dtype=torch.float64, device="cpu")
    _library().oreal_policy_terms(
        logp.data_ptr(), reference.data_ptr(), weight.data_ptr(), cu_seqlens.data_ptr(), sequences, reward.data_ptr(),
        advantage.data_ptr(), advantage_on_positives, correct_scale, incorrect_scale, kl_scale, kl_kind,
        grad.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad, sums


def add_weight_gradient(dlogits: Tensor, hidden: Tensor, main_grad: Tensor) -> bool:
    """Add dlogits [rows, columns] transposed @ hidden [rows, width], both bf16, to main_grad [columns, width] fp32.

    The sums are fp32; subnormal operands count as 0. Return False, with nothing changed, without AVX512-BF16.
    """
    rows = _matrix("dlogits", dlogits, {torch.bfloat16})
    _matrix("hidden", hidden, {torch.bfloat16}, (rows, hidden.shape[-1]))
    _matrix("main_grad", main_grad, {torch.float32}, (dlogits.shape[1], hidden.shape[1]))
    if len(main_grad) > 1 and main_grad.stride(0) < main_grad.shape[1]:
        raise ValueError(
            f"rows of main_grad overlap: {main_grad.shape[1]} columns with a stride of {main_grad.stride(0)}"
        )
    computed = _library().oreal_add_weight_gradient(
        dlogits.data_ptr(), dlogits.stride(0), hidden.data_ptr(), hidden.stride(0), main_grad.data_ptr(),
        main_grad.stride(0), rows, dlogits.shape[1], hidden.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return bool(computed)


def _library() -> ctypes.CDLL:
    library = load()
    if library is None:
        raise RuntimeError(f"{LIBRARY.name} is missing; check native.available() first, and use torch without it")
    return library


def _matrix(name: str, tensor: Tensor, dtypes: Collection[torch.dtype], shape: Sequence[int] | None = None) -> int:
    """Check a matrix whose columns are neighbours in memory; return its number of rows."""
    _check_dtype(name, tensor, dtypes)
    if tensor.dim() != 2 or (shape is not None and tuple(tensor.shape) != tuple(shape)):
        expected = "a matrix" if shape is None else list(shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {expected}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"columns of {name} are {tensor.stride(1)} elements apart; pass {name}.contiguous()")
    return tensor.shape[0]


def _vector(name: str, tensor: Tensor, dtypes: torch.dtype | Collection[torch.dtype], length: int | None = None) -> int:
    """Check a contiguous vector; return its length."""
    _check_dtype(name, tensor, dtypes if not isinstance(dtypes, torch.dtype) else {dtypes})
    if tensor.dim() != 1 or (length is not None and len(tensor) != length):
        expected = "a vector" if length is None else [length]
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {expected}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
    return len(tensor)


def _check_dtype(name: str, tensor: Tensor, dtypes: Collection[torch.dtype]) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the native library computes on the CPU only")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}, convert it with .to()")


def _check_columns(columns: int, logits: Tensor) -> None:
    if not 0 <= columns <= logits.shape[1]:
        raise ValueError(f"columns is {columns}; expected 0 to {logits.shape[1]}, those of the logits")


def _sequences(cu_seqlens: Tensor, tokens: int) -> int:
    """Check the offsets of sequences in `tokens` tokens; return the number of sequences."""
    _vector("cu_seqlens", cu_seqlens, torch.int64)
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens is {offsets}; expected offsets that rise from 0 to the {tokens} tokens")
    return len(offsets) - 1

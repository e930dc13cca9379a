"""Inputs that no kernel may see are refused alike by every implementation: temperatures, labels, offsets, lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oreal_kernels import (
    LossTerms,
    backend,
    input_checks,
    linear_logprob,
    linear_oreal_loss,
    logprob_from_logits,
    native,
    oreal_loss,
    prefix_reward_loss,
    reward_loss,
    token_weights,
)

HIDDEN, WEIGHT, LABELS = torch.randn(3, 8), torch.randn(16, 8), torch.tensor([1, 2, 3])
BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.fixture(params=BACKENDS, autouse=True)
def served_by(request):
    with backend.use(request.param):
        yield


def terms(offsets: list[int], tokens: int = 3, sequences: int | None = None, **changes) -> LossTerms:
    count = len(offsets) - 1 if sequences is None else sequences
    values = dict(
        reference_logp=torch.zeros(tokens), weight=torch.ones(tokens), cu_seqlens=torch.tensor(offsets),
        reward=torch.ones(count), advantage=torch.ones(count), correct_tokens=3, incorrect_tokens=0, action_tokens=3,
        positive_coef=1.0, negative_coef=1.0, kl_coef=0.1, kl_kind="k3", advantage_on_positives=True,
    )  # fmt: skip
    return LossTerms(**values | changes)


HEADS = {
    "linear_logprob": lambda **options: linear_logprob(HIDDEN, WEIGHT, LABELS, **options),
    "logprob_from_logits": lambda **options: logprob_from_logits(HIDDEN @ WEIGHT.t(), LABELS, **options),
    "linear_oreal_loss": lambda **options: linear_oreal_loss(HIDDEN, WEIGHT, LABELS, terms([0, 1, 3]), **options),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), [0.0] * 3, [1.0, -1.0, 1.0],
                                         [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0], [1.0, 1.0]])  # fmt: skip
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(head, temperature):
    given_as = torch.tensor(temperature) if isinstance(temperature, list) else temperature
    with pytest.raises(ValueError, match="temperature"):
        HEADS[head](temperature=given_as)
    HEADS[head](temperature=torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_labels_that_are_no_integers_are_refused(dtype):
    labels = LABELS.to(dtype)
    for call in (
        lambda: linear_logprob(HIDDEN, WEIGHT, labels),
        lambda: logprob_from_logits(HIDDEN @ WEIGHT.t(), labels),
        lambda: linear_oreal_loss(HIDDEN, WEIGHT, labels, terms([0, 3])),
    ):
        with pytest.raises(TypeError, match="labels are"):
            call()


OPERATIONS = {
    "token_weights": lambda offsets, count: token_weights(
        torch.zeros(3), torch.tensor(offsets), torch.ones(count) > 0, (0.5, 0.5)
    ),
    "prefix_reward_loss": lambda offsets, count: prefix_reward_loss(
        torch.zeros(3), torch.tensor(offsets), torch.ones(count), 2, "token"
    ),
    "reward_loss": lambda offsets, count: reward_loss(torch.zeros(3), torch.tensor(offsets), torch.ones(count), 2),
    "oreal_loss": lambda offsets, count: oreal_loss(torch.zeros(3), terms(offsets, sequences=count)),
    "linear_oreal_loss": lambda offsets, count: linear_oreal_loss(
        HIDDEN, WEIGHT, LABELS, terms(offsets, sequences=count)
    ),
}


@settings(max_examples=40)
@given(
    inner=st.lists(st.integers(-1, 5), max_size=4),
    first=st.sampled_from([0, 0, 0, 1, -1]),
    last=st.sampled_from([3, 3, 2, 4, 7]),
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_offsets_other_than_from_0_to_the_tokens_are_refused(operation, inner, first, last):
    offsets = [first, *inner, last]
    if offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == 3:
        OPERATIONS[operation](offsets, len(offsets) - 1)
        return
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATIONS[operation](offsets, len(offsets) - 1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_number_of_outcomes_than_sequences_is_refused(operation):
    with pytest.raises(ValueError, match=r"\[2\]"):
        OPERATIONS[operation]([0, 1, 3], 3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATIONS[operation]([], 0)


@pytest.mark.parametrize("field", ["reference_logp", "weight", "advantage"])
def test_terms_of_another_length_are_refused(field):
    wrong = dataclasses.replace(terms([0, 3]), **{field: torch.zeros(5)})
    with pytest.raises(ValueError, match=f"{field} has shape"):
        oreal_loss(torch.zeros(3), wrong)


def test_a_gpu_is_not_waited_for(monkeypatch):
    """A check of a value that is not on the CPU, or not known yet, is queued with its text."""
    queued = []
    monkeypatch.setattr(torch, "_assert_async", lambda valid, text: queued.append((bool(valid), text)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    input_checks.check_offsets(torch.zeros(3, dtype=torch.long), 5)
    assert queued == [(False, "cu_seqlens does not rise from 0 to the 5 tokens")]

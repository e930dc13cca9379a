"""Vocabulary-parallel log-probs, cut by hand, against torch.log_softmax."""

from __future__ import annotations

import oreal_kernels
import pytest
import torch


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 5, 20])
def test_log_prob_and_gradient(parts, padding):
    generator = torch.Generator().manual_seed(parts)
    vocab = 64 - padding  # with 20 of 64 columns padded, the last of four ranks holds nothing real
    logits = torch.randn(7, 64, generator=generator) * 5
    logits[:, vocab:] = 100.0  # padding that would win if it counted
    labels = torch.randint(0, vocab, (7,), generator=generator)
    labels[0] = vocab - 1
    grad = torch.randn(7, generator=generator)

    width = 64 // parts
    cuts = [(logits[:, i * width : (i + 1) * width], i * width) for i in range(parts)]
    stats = torch.stack([oreal_kernels.statistics(cut, labels, start, vocab) for cut, start in cuts])
    logp, log_sum_exp = oreal_kernels.combine(stats)
    slopes = [oreal_kernels.gradient(cut, labels, log_sum_exp, grad, start, vocab) for cut, start in cuts]

    real = logits[:, :vocab].double().requires_grad_()
    expected = torch.log_softmax(real, 1)
    wanted = expected[torch.arange(7), labels]
    (wanted * grad).sum().backward()
    torch.testing.assert_close(logp, wanted.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(slopes, 1)[:, :vocab], real.grad.float(), atol=1e-5, rtol=1e-4)
    assert not torch.cat(slopes, 1)[:, vocab:].any()


def test_logits_whose_exponential_overflows():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]])
    stats = oreal_kernels.statistics(logits, torch.tensor([1, 0]), 0, 2)[None]
    logp, _ = oreal_kernels.combine(stats)
    assert logp.tolist() == pytest.approx([-1e4, -0.6931472])

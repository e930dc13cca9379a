"""Providers of a language-model head: each computes the sum of log-probs, or a loss, from hidden states and a weight.

All get the same random hidden states and labels, peaked like a trained model's: half of the labels are the likeliest
token.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from oreal_kernels import LossTerms, linear_logprob, linear_oreal_loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class HeadCase:
    """Shape, dtype and device of a comparison."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: str
    budget: int  # bytes of logits in the modes of oreal_kernels

    @property
    def shape(self) -> str:
        """Shape as rows x width x vocabulary."""
        return f"{self.rows} x {self.width} x {self.vocabulary}"


class HeadProviders:
    """Inputs of a case and the providers that run on this machine."""

    def __init__(self, case: HeadCase):
        self.case = case
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(case.vocabulary, case.width, generator=generator) * 3 / case.width**0.5
        self.labels = torch.randint(0, case.vocabulary, (case.rows,), generator=generator)
        hidden = torch.randn(case.rows, case.width, generator=generator)
        hidden[::2] += 1.5 * weight[self.labels[::2]]
        to = dict(device=case.device, dtype=case.dtype)
        self.weight, self.hidden, self.labels = weight.to(**to), hidden.to(**to), self.labels.to(case.device)
        self.main_grad = torch.zeros(case.vocabulary, case.width, device=case.device)
        self.terms = self._terms(case.rows, generator)

    def _terms(self, rows: int, generator: torch.Generator) -> LossTerms:
        half, device = rows // 2, self.case.device
        return LossTerms(
            reference_logp=(torch.randn(rows, generator=generator) - 6).to(device),
            weight=torch.rand(rows, generator=generator).to(device),
            cu_seqlens=torch.tensor([0, half, rows], device=device),
            reward=torch.tensor([1.0, -1.0], device=device),
            advantage=torch.tensor([0.8, -0.8], device=device),
            correct_tokens=half, incorrect_tokens=rows - half, action_tokens=rows, positive_coef=1.0, negative_coef=0.5,
            kl_coef=0.01, kl_kind="k3", advantage_on_positives=True,
        )  # fmt: skip

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return hidden states and weight as leaves without gradient."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def providers(self, only: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield name and forward of the providers whose names contain one of the words in `only` (all if empty)."""
        for name, forward in self._all():
            if not only or any(word in name for word in only.split(",")):
                yield name, forward

    def _all(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        case, labels, budget = self.case, self.labels, self.case.budget
        options = dict(main_grad=self.main_grad, budget_bytes=budget)
        yield "naive torch", lambda: naive(*self.leaves(), labels)
        yield "torch in chunks", lambda: chunked(*self.leaves(), labels)
        if case.device == "cuda" or shutil.which("g++"):
            compiled = cache(lambda: torch.compile(naive))  # imports the compiler, which takes seconds
            yield "torch.compile", lambda: compiled()(*self.leaves(), labels)
        if hasattr(F, "linear_cross_entropy"):
            yield "F.linear_cross_entropy", lambda: F.linear_cross_entropy(*self.leaves(), labels, reduction="sum")
        yield from installed(self)
        yield "linear_logprob save", lambda: linear_logprob(*self.leaves(), labels, mode="save", **options)[0].sum()
        yield (
            "linear_logprob recompute",
            lambda: linear_logprob(*self.leaves(), labels, mode="recompute", **options)[0].sum(),
        )
        yield "linear_logprob auto", lambda: linear_logprob(*self.leaves(), labels, **options)[0].sum()
        yield (
            "linear_oreal_loss",
            lambda: linear_oreal_loss(*self.leaves(), labels, self.terms, loss_scale=1.0, **options).loss,
        )

    def bare_products(self) -> Callable[[], None]:
        """Return the three products that every provider needs; the unit of all ratios."""
        hidden, weight = self.hidden, self.weight

        def products() -> None:
            logits = hidden @ weight.t()
            logits @ weight
            logits.t() @ hidden

        return products


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute all logits, an fp32 copy of them and log_softmax."""
    logits = (hidden @ weight.t()).float()
    return torch.log_softmax(logits, -1).gather(1, labels[:, None]).sum()


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """Compute some rows at a time, recomputed in the backward."""
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    return sum(checkpoint(naive, x, weight, y, use_reentrant=False) for x, y in parts)


def installed(head: HeadProviders) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield providers of other packages that are installed; all of them need a GPU."""
    if head.case.device != "cuda":
        return
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        def liger_forward() -> Tensor:
            hidden, weight = head.leaves()
            return liger(hidden, weight, head.labels, reduction="sum")

        yield "Liger", liger_forward
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        for name, skipped in (("CCE", "high"), ("CCE exact", None)):  # gradients that it leaves out
            yield (
                name,
                lambda skipped=skipped: linear_cross_entropy(
                    *head.leaves(), head.labels, reduction="sum", filter_eps=skipped
                ),
            )
    if importlib.util.find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        yield "QuACK", lambda: chunked_linear_cross_entropy(*head.leaves(), head.labels, reduction="sum")

"""Stages of tools/gpu_acceptance.py: the fused operations on one GPU, their errors and their speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_machine import NOT_JUDGED, Machine, Row, error
from oreal_kernels import LossTerms, gemm, linear_oreal_loss, logprob_from_logits, row_gradient, row_statistics
from torch import Tensor


def kernels(machine: Machine) -> Iterator[Row]:
    """Compare log-prob, entropy and gradients in bf16 with float64, at edges of shapes and labels, twice."""
    shapes = [(1, 70), (63, 4097), (65, 500)] if machine.dry else [(1, 70), (63, 4097), (65537, 1000), (300, 152064)]
    for rows, columns in shapes:
        logits = machine.random(rows, columns, scale=3.0)
        labels = torch.arange(rows, device=machine.device) * 37 % columns
        labels[0], labels[-1] = 0, columns - 1
        if rows > 2:
            labels[1] = -100
        weight = torch.linspace(-1, 1, rows, device=machine.device) + 0.01
        runs = [_logprob_and_gradient(logits, labels, weight, logprob_from_logits) for _ in range(2)]
        exact = _logprob_and_gradient(logits.double(), labels, weight.double(), _plain_logprob)
        plain = _logprob_and_gradient(logits.float(), labels, weight, _plain_logprob)
        name = f"{rows} x {columns}"
        yield machine.at_most("kernels", f"{name}: bits differ in a second run", _differing(runs), 0)
        for what, ours, theirs, truth in zip(("log-prob", "gradient"), runs[0], plain, exact, strict=True):
            rounded = theirs.bfloat16() if what == "gradient" else theirs
            limit = 2 * error(rounded, truth) + 1e-7
            yield machine.at_most("kernels", f"{name}: error of {what}", error(ours, truth), limit)


def weight_gradient(machine: Machine) -> Iterator[Row]:
    """Add a bf16 product to an fp32 sum in place, from a transposed operand, against float64."""
    rows, columns, hidden = (64, 96, 32) if machine.dry else (4096, 38016, 3584)
    dlogits, x = machine.random(rows, columns), machine.random(rows, hidden)
    total = torch.ones(columns, hidden, device=machine.device)
    gemm.add_weight_gradient(dlogits, x, total)
    sample = slice(0, 512)
    exact = 1 + dlogits[:, sample].double().t() @ x.double()
    limit = rows**0.5 * torch.finfo(torch.float32).eps  # rounding of a sum of `rows` terms in fp32
    yield machine.at_most("weight_gradient", "relative error of the sum", error(total[sample], exact), limit)


def head(machine: Machine) -> Iterator[Row]:
    """Time the head against the three bare products, and its passes over logits against a copy."""
    rows, hidden, columns = (128, 64, 600) if machine.dry else (16384, 5120, 152064)
    x, weight = machine.random(rows, hidden).requires_grad_(), machine.random(columns, hidden, scale=0.02)
    weight.requires_grad_()
    labels = torch.arange(rows, device=machine.device) % columns
    chunk = min(rows, 4096)
    dlogits = machine.random(chunk, columns, scale=0.01)
    detached = x.detach()[:chunk], weight.detach()

    def products() -> None:
        for _ in range(rows // chunk):
            torch.mm(detached[0], detached[1].t())
            torch.mm(dlogits, detached[1])
            torch.mm(dlogits.t(), detached[0])

    bare = machine.seconds(products)
    main_grad = torch.zeros(columns, hidden, device=machine.device)
    terms = _loss_terms(rows, machine.device)
    for budget_mib in (1024, 1280, 2560):

        def forward_and_backward(budget: int = budget_mib * 2**20) -> None:
            x.grad = weight.grad = None
            options = dict(budget_bytes=budget, main_grad=main_grad, loss_scale=1.0)
            linear_oreal_loss(x, weight, labels, terms, **options).loss.backward()

        name = f"loss with head, {budget_mib} MiB of logits, over three products"
        yield machine.at_most("head", name, machine.seconds(forward_and_backward) / bare, 1.10, speed=True)
        extra = machine.peak_bytes(forward_and_backward) / 2**30
        name = f"memory of loss with head, {budget_mib} MiB of logits"
        yield machine.at_most("head", name, extra, 1.15 * budget_mib / 1024 + 0.5, "GiB", speed=True)
    yield from _passes(machine, dlogits, labels[:chunk])


def _passes(machine: Machine, logits: Tensor, labels: Tensor) -> Iterator[Row]:
    """Yield the bandwidth of the statistics and gradient passes as shares of a copy's."""
    rows, columns = logits.shape
    ones = torch.ones(rows, device=machine.device)
    out = torch.empty_like(logits)
    copy = 2 * logits.nbytes / machine.seconds(lambda: out.copy_(logits))
    yield Row("head", "copy bandwidth", f"{copy / 1e12:.3g} TB/s", "measured", NOT_JUDGED)
    statistics = machine.seconds(lambda: row_statistics.row_statistics(logits, labels, ones, 0.0, columns))
    yield machine.at_least("head", "statistics pass, share of copy", logits.nbytes / statistics / copy, 0.8)
    per_row = ones * 3, ones, ones, ones
    arguments = logits, out, labels, ones, 0.0, columns, *per_row
    gradient = machine.seconds(lambda: row_gradient.row_gradient(*arguments, None))
    yield machine.at_least("head", "gradient pass, share of copy", 2 * logits.nbytes / gradient / copy, 0.8)


def _logprob_and_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor], tuple[Tensor, object]]
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    logp, _ = compute(leaf, labels)
    (logp * weight).sum().backward()
    assert leaf.grad is not None
    return logp.detach(), leaf.grad


def _loss_terms(rows: int, device: torch.device) -> LossTerms:
    half = rows // 2
    return LossTerms(
        reference_logp=torch.full((rows,), -6.0, device=device),
        weight=torch.linspace(0, 1, rows, device=device),
        cu_seqlens=torch.tensor([0, half, rows], device=device),
        reward=torch.tensor([1.0, -1.0], device=device),
        advantage=torch.tensor([0.5, -0.5], device=device),
        correct_tokens=half,
        incorrect_tokens=rows - half,
        action_tokens=rows,
        positive_coef=1.0,
        negative_coef=0.5,
        kl_coef=0.01,
        kl_kind="k3",
        advantage_on_positives=True,
    )


def _plain_logprob(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
    chosen = F.log_softmax(logits, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, chosen, 0), None


def _differing(runs: list[tuple[Tensor, Tensor]]) -> int:
    return sum(not torch.equal(first, second) for first, second in zip(*runs, strict=True))

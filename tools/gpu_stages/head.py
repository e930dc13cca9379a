"""Stage of tools/gpu_acceptance.py: time and memory of the head on one GPU, beside bare products and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from oreal_kernels import linear_oreal_loss, row_gradient, row_statistics
from torch import Tensor

from gpu_stages.machine import Machine, Row, use_trainer_products
from gpu_stages.row_cases import row_terms

ROWS, WIDTH, COLUMNS = 16384, 5120, 152064
GIB = 2**30


def head(machine: Machine) -> Iterator[Row]:
    """Time the head against three bare products of all rows, and its passes over logits against a copy."""
    use_trainer_products()
    rows, width, columns = (128, 64, 640) if machine.dry else (ROWS, WIDTH, COLUMNS)
    yield from _against_products(machine, rows, width, columns, (1024, 1280, 2560))
    yield from _against_products(machine, rows, width, columns // 8, (1280,))
    yield from _passes(machine, min(rows, 4096), columns)


def _against_products(
    machine: Machine, rows: int, width: int, columns: int, budgets_mib: tuple[int, ...]
) -> Iterator[Row]:
    """Yield the speed of each product, the head's time over all three, and its memory, for budgets of logits.

    The time is judged for all columns; those of one of eight ranks have fewer operations for the same passes.
    """
    x, weight = machine.random(rows, width).requires_grad_(), machine.random(columns, width, scale=0.02)
    weight.requires_grad_()
    speeds, bare = _time_products(machine, x.detach(), weight.detach())
    for name, speed in speeds.items():
        yield machine.measured("head", f"product for {name}, {columns} columns", speed, "TFLOP/s")
    step = _loss_and_gradients(x, weight)
    for budget_mib in budgets_mib:

        def at_budget(budget: int = budget_mib * 2**20) -> None:
            step(budget)

        case = f"loss with head, {columns} columns, {budget_mib} MiB of logits"
        ratio = machine.seconds(at_budget) / bare
        if columns < COLUMNS and not machine.dry:
            yield machine.measured("head", f"time of {case}", ratio, "of three products")
        else:
            yield machine.at_most("head", f"time of {case}", ratio, 1.10, "of three products", speed=True)
        extra = machine.peak_bytes(at_budget) / GIB
        limit = 1.15 * budget_mib / 1024 + x.nbytes / GIB  # the hidden states' gradient has their size
        yield machine.at_most("head", f"memory of {case}", extra, limit, "GiB", speed=True)


def _time_products(machine: Machine, x: Tensor, weight: Tensor) -> tuple[dict[str, float], float]:
    """Return the TFLOP/s of the products that a head needs, each of all rows at once, and the seconds of all three."""
    dlogits = machine.random(len(x), len(weight), scale=0.01)
    products = {
        "logits": lambda: torch.mm(x, weight.t()),
        "gradient of hidden": lambda: torch.mm(dlogits, weight),
        "gradient of weight": lambda: torch.mm(dlogits.t(), x),
    }
    operations = 2 * dlogits.numel() * x.shape[1]
    speeds = {name: operations / machine.seconds(product) / 1e12 for name, product in products.items()}
    return speeds, machine.seconds(lambda: [product() for product in products.values()])


def _loss_and_gradients(x: Tensor, weight: Tensor) -> Callable[[int], None]:
    """Return a forward and backward of the loss with a budget of bytes, the weight's gradient summed in float32."""
    labels = torch.arange(len(x), device=x.device) % len(weight)
    main_grad = torch.zeros(weight.shape, device=x.device)
    inputs = {"reference_logp": torch.full((len(x),), -6.0, device=x.device)}
    inputs["weight_of_token"] = torch.linspace(0, 1, len(x), device=x.device)
    terms = row_terms(inputs, len(x), entropy_coef=0.0)

    def step(budget_bytes: int) -> None:
        x.grad = weight.grad = None
        options = dict(budget_bytes=budget_bytes, main_grad=main_grad, loss_scale=1.0)
        linear_oreal_loss(x, weight, labels, terms, **options).loss.backward()

    return step


def _passes(machine: Machine, rows: int, columns: int) -> Iterator[Row]:
    """Yield the bandwidth of the statistics and gradient passes as shares of a copy's."""
    logits, ones = machine.random(rows, columns, scale=0.01), torch.ones(rows, device=machine.device)
    labels = torch.arange(rows, device=machine.device) % columns
    out = torch.empty_like(logits)
    copy = 2 * logits.nbytes / machine.seconds(lambda: out.copy_(logits))
    yield machine.measured("head", "copy bandwidth", copy / 1e12, "TB/s")
    statistics = machine.seconds(lambda: row_statistics.row_statistics(logits, labels, ones, 0.0, columns))
    yield machine.at_least("head", "statistics pass, share of copy", logits.nbytes / statistics / copy, 0.8)
    per_row = ones * 3, ones, ones, ones
    arguments = logits, out, labels, ones, 0.0, columns, *per_row
    gradient = machine.seconds(lambda: row_gradient.row_gradient(*arguments, None))
    yield machine.at_least("head", "gradient pass, share of copy", 2 * logits.nbytes / gradient / copy, 0.8)

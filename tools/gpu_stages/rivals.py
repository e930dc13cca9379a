"""Stage of tools/gpu_acceptance.py: heads of other packages beside this project's, and the loss beside a copy."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from oreal_kernels import policy_loss

from gpu_stages.machine import NOT_JUDGED, Machine, Row, use_trainer_products

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels/benchmarks"))
import head_providers  # noqa: E402
import loss_providers  # noqa: E402

PACKAGES = {"Liger": "liger_kernel", "CCE": "cut_cross_entropy", "QuACK": "quack"}
RECOMPUTE_LOGITS = ("CCE", "CCE exact")  # in the backward, a fourth product
OURS = "linear_oreal_loss"


def rivals(machine: Machine) -> Iterator[Row]:
    """Time installed heads, of all columns and of one of eight ranks, and the loss at 16 x 14000 tokens."""
    use_trainer_products()
    for name, package in PACKAGES.items():
        if not importlib.util.find_spec(package):
            yield Row("rivals", f"head of {name}", "not installed", "measured", NOT_JUDGED)
    rows, width, columns = (64, 32, 640) if machine.dry else (16384, 5120, 152064)
    for part in (1, 8):
        shape = (rows, width, columns // part)
        case = head_providers.HeadCase(*shape, torch.bfloat16, machine.device.type, budget=1280 * 2**20)
        times = yield from _time_heads(machine, head_providers.HeadProviders(case), case.shape)
        if part == 8:
            yield from compare(machine, case.shape, times)
    yield from _loss(machine)


def _time_heads(
    machine: Machine, heads: head_providers.HeadProviders, shape: str
) -> Generator[Row, None, dict[str, float]]:
    """Yield each head's time over that of three bare products; return the seconds."""
    bare, times = machine.seconds(heads.bare_products()), {}
    for name, forward in heads.providers(",".join([*PACKAGES, "linear_"])):
        try:
            times[name] = machine.seconds(lambda forward=forward: forward().backward())
        except Exception as failure:  # a package's release may not fit this torch or this GPU
            if name.startswith("linear_"):
                raise
            message = f"{type(failure).__name__}: {failure}".splitlines()[0]
            yield Row("rivals", f"{name}, {shape}", message[:60], "measured", NOT_JUDGED)
        else:
            yield machine.measured("rivals", f"{name}, {shape}", times[name] / bare, "of three products")
    return times


def compare(machine: Machine, shape: str, times: dict[str, float]) -> Iterator[Row]:
    """Yield how much faster this project's loss with head is than each head that computes logits again."""
    for name in RECOMPUTE_LOGITS:
        if name in times:
            ratio = times[name] / times[OURS]
            yield machine.at_least("rivals", f"{name} over {OURS}, {shape}", ratio, 1.3)


def _loss(machine: Machine) -> Iterator[Row]:
    """Yield the time of the loss with its slopes over that of a copy of as many bytes; also with token weights.

    A copy at 16 x 14000 tokens takes about as long as a kernel's start; the larger shape shows the bandwidth.
    """
    shapes = ((3, 50), (6, 50)) if machine.dry else ((16, 14000), (1024, 14000))
    for sequences, tokens in shapes:
        case = loss_providers.LossProviders(sequences, tokens, machine.device.type)
        copy = machine.seconds(case.bare_copy())
        ratio = machine.seconds(lambda case=case: policy_loss.policy_terms(case.logp, case.terms)) / copy
        name = f"loss and slopes, {case.shape} tokens"
        if (sequences, tokens) == shapes[-1]:
            yield machine.at_most("rivals", name, ratio, 1.25, "of a copy", speed=True)
        else:
            yield machine.measured("rivals", name, ratio, "of a copy")
        ((name, forward),) = case.providers("token_weights")
        seconds = machine.seconds(lambda forward=forward: forward().backward())
        yield machine.measured("rivals", f"{name}, forward and backward, {case.shape}", seconds / copy, "of a copy")

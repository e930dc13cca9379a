"""Check a machine with one GPU, in order of value per minute, and measure what this project claims about GPUs.

    python tools/gpu_acceptance.py [STAGE ...] [--json FILE] [--dry-run]

Prints one table: each value beside its criterion. Exit code 0 if all criteria hold, 1 if one does not, 2 without a GPU.
Every stage has a time limit. `--dry-run` runs the same logic with small shapes on the CPU; speed is then not judged.
Needs torch, Triton and megatron-core; the stage `doctor` needs vLLM too. No network is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_engine import checkpoint, sleep, sync
from gpu_machine import FAILED, NOT_JUDGED, PASSED, Machine, Row
from gpu_training import training
from oreal_kernels import LossTerms, gemm, linear_oreal_loss, logprob_from_logits, row_gradient, row_statistics
from torch import Tensor

from oreal_megatron.mcore import varlen_attention


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
            limit = 2 * _error(rounded, truth) + 1e-7
            yield machine.at_most("kernels", f"{name}: error of {what}", _error(ours, truth), limit)


def weight_gradient(machine: Machine) -> Iterator[Row]:
    """Add a bf16 product to an fp32 sum in place, from a transposed operand, against float64."""
    rows, columns, hidden = (64, 96, 32) if machine.dry else (4096, 38016, 3584)
    dlogits, x = machine.random(rows, columns), machine.random(rows, hidden)
    total = torch.ones(columns, hidden, device=machine.device)
    gemm.add_weight_gradient(dlogits, x, total)
    sample = slice(0, 512)
    exact = 1 + dlogits[:, sample].double().t() @ x.double()
    limit = rows**0.5 * torch.finfo(torch.float32).eps  # rounding of a sum of `rows` terms in fp32
    yield machine.at_most("weight_gradient", "relative error of the sum", _error(total[sample], exact), limit)


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


def attention(machine: Machine) -> Iterator[Row]:
    """Packed attention: error against float64, speed and growth of memory, and the kernel that serves it."""
    heads, groups, width = (4, 2, 16) if machine.dry else (28, 4, 128)
    tokens = 96 if machine.dry else 2048
    offsets = [0, tokens // 3, tokens // 2, tokens]
    plan = varlen_attention.AttentionPlan(varlen_attention.segments(offsets, [range(tokens)]), machine.device)
    q, k, v = (machine.random(tokens, count, width) for count in (heads, groups, groups))
    exact, plain = (
        torch.cat([_one_sequence(q, k, v, slice(*pair), dtype) for pair in itertools.pairwise(offsets)])
        for dtype in (torch.float64, torch.bfloat16)
    )
    limit = 2 * _error(plain, exact) + 1e-7
    yield machine.at_most("attention", "error, three sequences", _error(plan.attend(q, k, v), exact), limit)
    kernel = varlen_attention.use_fastest_kernel(machine.device) or "FlashAttention 2"
    offered = varlen_attention.causal_options(varlen_attention.varlen_attn) is not None
    yield Row("attention", "kernel", kernel if not machine.dry else "padded", "variable-length flash attention",
              NOT_JUDGED if machine.dry else PASSED if offered else FAILED)  # fmt: skip
    lengths = (128, 256) if machine.dry else (8192, 16384)
    peaks = []
    for length in lengths:
        long = varlen_attention.AttentionPlan(varlen_attention.segments([0, length], [range(length)]), machine.device)
        q, k, v = (machine.random(length, count, width) for count in (heads, groups, groups))
        peaks.append(machine.peak_bytes(lambda q=q, k=k, v=v, long=long: long.attend(q, k, v)))
    seconds = machine.seconds(lambda: long.attend(q, k, v))
    speed = 2 * lengths[1] ** 2 * heads * width / seconds / 1e12  # two products, half of each masked
    yield machine.at_least("attention", f"forward, one sequence of {lengths[1]}", speed, 300, "TFLOP/s")
    yield machine.at_most("attention", "memory at twice the length", peaks[1] / max(peaks[0], 1), 2.2, speed=True)


def doctor(machine: Machine) -> Iterator[Row]:
    """Run `oreal doctor`: a collective, generation, an update and a weight sync with vLLM and Megatron."""
    if machine.dry or importlib.util.find_spec("vllm") is None:
        reason = "dry run" if machine.dry else "vLLM is not installed"
        yield Row("doctor", "oreal doctor", reason, "exit code 0", NOT_JUDGED)
        return
    command = [sys.executable, "-m", "oreal_megatron", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
    yield machine.at_most("doctor", "exit code of oreal doctor", done.returncode, 0)


STAGES: dict[str, tuple[Callable[[Machine], Iterator[Row]], int]] = {  # in order of value per minute, with limits in s
    "kernels": (kernels, 240),
    "weight_gradient": (weight_gradient, 60),
    "head": (head, 240),
    "attention": (attention, 180),
    "training": (training, 240),
    "sync": (sync, 60),
    "checkpoint": (checkpoint, 180),
    "sleep": (sleep, 60),
    "doctor": (doctor, 480),
}


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


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    each = q.shape[1] // k.shape[1]
    query, key, value = (x[rows].to(dtype).transpose(0, 1) for x in (q, k, v))
    key, value = key.repeat_interleave(each, 0), value.repeat_interleave(each, 0)
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0].transpose(0, 1)


def _error(result: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest magnitude; infinity if any value is not finite."""
    difference = (result.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=torch.inf))


def _differing(runs: list[tuple[Tensor, Tensor]]) -> int:
    return sum(not torch.equal(first, second) for first, second in zip(*runs, strict=True))


def run_stage(name: str, machine: Machine) -> list[Row]:
    """Run one stage within its limit; an error or the limit becomes a row that fails."""
    stage, limit_s = STAGES[name]

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {limit_s} s")

    rows: list[Row] = []
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        rows.extend(stage(machine))
    except Exception as error:  # the stages after it still tell something
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(Row(name, "stage ends", message[:60], "without an error", FAILED))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the table, write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's name to this file")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; speed is not judged")
    args = parser.parse_args(arguments)
    for unknown in (name for name in args.stages if name not in STAGES):
        parser.error(f"there is no stage {unknown}; expected some of {', '.join(STAGES)}")
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_acceptance: torch sees no GPU here; run it where one is, or with --dry-run", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    card = "CPU, dry run" if args.dry_run else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    for name in args.stages or STAGES:
        for row in run_stage(name, machine):
            rows.append(row)
            print(f"{row.result:10}  {row.stage}: {row.check}: {row.value} (criterion: {row.criterion})", flush=True)
        if args.json:
            result = {"card": card, "torch": torch.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
            args.json.write_text(json.dumps(result, indent=1))
    failed = sum(row.result == FAILED for row in rows)
    print(f"{failed} of {len(rows)} criteria do not hold" if failed else f"no criterion of {len(rows)} is violated")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

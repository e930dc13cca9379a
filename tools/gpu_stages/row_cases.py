"""Cases of the operations on rows of logits, for the stage `kernels` of tools/gpu_acceptance.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import oreal_kernels
import torch
from oreal_kernels import LossTerms, hidden_to_logprob, hidden_to_loss, logits_to_logprob
from torch import Tensor

from gpu_stages.comparison import Case, Results
from gpu_stages.machine import Machine


class Edge(NamedTuple):
    """Shape and options of a case."""

    rows: int
    columns: int
    padding: int = 0  # of the columns, at the end
    options: dict[str, float] = {}


EDGES = (
    Edge(1, 70),
    Edge(63, 4097),
    Edge(65537, 1000),
    Edge(300, 19008),
    Edge(300, 38016),
    Edge(300, 152064),
    Edge(300, 152064, padding=128),
    Edge(63, 5000, padding=137),
    Edge(63, 5000, options={"temperature": 0.01}),
    Edge(63, 5000, options={"temperature": 10.0}),
    Edge(63, 5000, options={"softcap": 30.0, "temperature": 0.7}),
)


class RowInputs:
    """Labels and shared arguments of an edge; a dry run has fewer rows and columns."""

    def __init__(self, machine: Machine, edge: Edge):
        self.rows = min(edge.rows, 65) if machine.dry else edge.rows
        self.columns = edge.columns // 64 if machine.dry and edge.columns > 5000 else edge.columns
        padding = min(edge.padding, self.columns // 3)
        self.options: dict[str, float] = edge.options | ({"vocab_size": self.columns - padding} if padding else {})
        self.labels = torch.arange(self.rows, device=machine.device) * 37 % (self.columns - padding)
        self.labels[0], self.labels[-1] = 0, self.columns - padding - 1
        if self.rows > 2:
            self.labels[1] = -100
        shown = "".join(f", {name} {value}" for name, value in self.options.items())
        self.name = f"{self.rows} x {self.columns}{shown}"


def logprob_from_logits(machine: Machine) -> Iterator[Case]:
    """Yield the edges, and one of more than 2^31 logits."""
    for edge in EDGES:
        row = RowInputs(machine, edge)

        def compute(function: Callable[..., tuple[Tensor, Tensor]], inputs: Results, row: RowInputs = row) -> Results:
            return _named(function(inputs["logits"], row.labels, **row.options))

        inputs = {"logits": machine.random(row.rows, row.columns, scale=3.0)}
        yield _case(row.name, inputs, compute, oreal_kernels.logprob_from_logits, logits_to_logprob.reference)
    yield far_rows(machine)


def far_rows(machine: Machine) -> Case:
    """Return a case of 2.5e9 logits, of which some rows are compared: an offset of 32 bits would miss the last ones."""
    rows, columns = (70, 600) if machine.dry else (16500, 152064)
    last_near = min(2**31 // columns, rows - 3)
    chosen = torch.tensor([0, 1, last_near - 1, last_near, last_near + 1, rows - 1], device=machine.device)
    labels = torch.arange(rows, device=machine.device) * 37 % columns
    generator = torch.Generator(machine.device).manual_seed(0)
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=machine.device).normal_(generator=generator)

    def fused(inputs: Results) -> Results:
        full = logits.index_copy(0, chosen, inputs["logits"])
        logp, entropy = oreal_kernels.logprob_from_logits(full, labels, in_place_backward=True)
        return {"log-prob": logp[chosen], "entropy": entropy[chosen]}

    def reference(inputs: Results) -> Results:
        return _named(logits_to_logprob.reference(inputs["logits"], labels[chosen]))

    inputs = {"logits": machine.random(len(chosen), columns, scale=3.0)}
    return Case(f"{rows} x {columns}, rows up to the last", inputs, ("logits",), fused, reference)


def linear_logprob(machine: Machine) -> Iterator[Case]:
    """Yield the edges with saved and with recomputed logits, the latter in several chunks."""
    for edge in EDGES:
        row = RowInputs(machine, edge)
        for mode in ("save", "recompute"):
            fused_options = {"mode": mode, "budget_bytes": _third(row)}

            def compute(
                function: Callable[..., tuple[Tensor, Tensor]], inputs: Results, row: RowInputs = row, **options: object
            ) -> Results:
                return _named(function(inputs["hidden"], inputs["weight"], row.labels, **row.options, **options))

            name, inputs = f"{mode}, {row.name}", _hidden_inputs(machine, row)
            functions = oreal_kernels.linear_logprob, hidden_to_logprob.reference
            yield _case(name, inputs, compute, *functions, **fused_options)


def linear_oreal_loss(machine: Machine) -> Iterator[Case]:
    """Yield the edges in several chunks, with an entropy term."""
    for edge in EDGES:
        row = RowInputs(machine, edge)

        def compute(
            function: Callable[..., hidden_to_loss.OrealLossResult],
            inputs: Results,
            row: RowInputs = row,
            **options: object,
        ) -> Results:
            terms = row_terms(inputs, row.rows)
            result = function(inputs["hidden"], inputs["weight"], row.labels, terms, **row.options, **options)
            return {"loss": result.loss, "log-prob": result.logp, "entropy": result.entropy}

        inputs = _hidden_inputs(machine, row)
        reference_logp = machine.random(row.rows, seed=3).float() * 1.1 - 6
        weight_of_token = machine.random(row.rows, seed=4).float().abs().clamp(max=1)
        inputs |= {"reference_logp": reference_logp, "weight_of_token": weight_of_token}
        functions = oreal_kernels.linear_oreal_loss, hidden_to_loss.reference
        yield _case(row.name, inputs, compute, *functions, budget_bytes=_third(row))


def row_terms(inputs: Results, rows: int, entropy_coef: float = 0.5) -> LossTerms:
    """Return a loss over four sequences, one of them empty; its KL term has no exponential, which would hide errors."""
    device = inputs["weight_of_token"].device
    return LossTerms(
        reference_logp=inputs["reference_logp"],
        weight=inputs["weight_of_token"],
        cu_seqlens=torch.tensor([0, rows // 3, rows // 3, rows // 2, rows], device=device),
        reward=torch.tensor([1.0, -1.0, -1.0, 1.0], device=device),
        advantage=torch.tensor([0.4, -0.3, -1.6, 1.2], device=device),
        correct_tokens=rows, incorrect_tokens=rows, action_tokens=rows, positive_coef=1.0, negative_coef=0.5,
        kl_coef=0.3, kl_kind="k2", advantage_on_positives=True, entropy_coef=entropy_coef,
    )  # fmt: skip


def _case(
    name: str,
    inputs: Results,
    compute: Callable[..., Results],
    fused: Callable[..., object],
    reference: Callable[..., object],
    **options: object,
) -> Case:
    """Return a case whose leaves are logits, or hidden states and weight; the options are the fused operation's."""
    leaves = tuple(leaf for leaf in ("logits", "hidden", "weight") if leaf in inputs)
    return Case(
        name,
        inputs,
        leaves,
        lambda values: compute(fused, values, **options),
        lambda values: compute(reference, values),
    )


def _hidden_inputs(machine: Machine, row: RowInputs) -> Results:
    width = 32 if machine.dry else 256
    weight = machine.random(row.columns, width, scale=3 / width**0.5, seed=1)
    return {"hidden": machine.random(row.rows, width, seed=2), "weight": weight}


def _third(row: RowInputs) -> int:
    return max(1, row.rows // 3) * row.columns * torch.bfloat16.itemsize


def _named(results: tuple[Tensor, Tensor]) -> Results:
    return {"log-prob": results[0], "entropy": results[1]}

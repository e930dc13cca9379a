"""`oreal replay DUMP`: compute a dumped step again from the checkpoint before it, and compare."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from oreal_megatron.observe import dumps
from oreal_megatron.observe.dumps import Dump, DumpShare
from oreal_megatron.protocols import TokenValues
from oreal_megatron.runtime import checkpoint_folders, distributed
from oreal_megatron.session.inputs import read_inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", help="a dumped step, such as RUN/dumps/step_000013")
    parser.add_argument("--resume", metavar="RUN", help="the run folder with the checkpoints, if it has been moved")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative difference that counts as none")


def run(args: argparse.Namespace) -> int:
    dump = dumps.read_dump(Path(args.dump))
    config = dataclasses.replace(dump.config, run=args.resume or dump.config.run)
    inputs = read_inputs(config)

    from oreal_megatron.mcore import (  # imports Megatron, which takes seconds
        checkpoint_state,
        gpt_model,
        parallel,
        trained_models,
    )

    names = ["policy"] + ["reward_model"] * config.reward_model.enabled
    folder = Path(config.run) / "checkpoints"
    steps = [step for step in map(checkpoint_folders.step_of, checkpoint_folders.complete(folder)) if step <= dump.step]
    played = _steps(dump, max(steps, default=0))
    parallel.start_process_group()
    start = checkpoint_state.choose(folder, names, max(steps), damaged_too=False) if steps else None
    parallel.start_megatron(config.parallel, config.seed)
    spec = parallel.packing_spec(config.tokens_per_micro_batch)
    shares = [step.share(spec.rank, spec.ranks) for step in played]  # refuses what is damaged
    pieces = (inputs.arch, config, inputs.folder.tensor)
    policy, reference = trained_models.Policy(*pieces), trained_models.Reference(*pieces)
    reward_model = (
        trained_models.TokenRewardModel(*pieces) if config.reward_model.enabled else trained_models.NoRewardModel()
    )
    if start:
        checkpoint_state.load(start, dict(zip(names, (policy, reward_model), strict=False)))
    for step, share in zip(played, shares, strict=True):
        again = _again(step, share.to(gpt_model.device()), policy, reference, reward_model)
    source = str(start) if start else f"the starting model {config.model.path}"
    table = compare(dump.metrics, again, args.tolerance)
    if distributed.rank() == 0:
        print_table(table, f"step {dump.step}, from {source}, steps {', '.join(str(step.step) for step in played)}")
    parallel.stop()
    return 0 if all(row.same for row in table) else 1


def _steps(dump: Dump, first: int) -> list[Dump]:
    """The dumped steps from `first` up to this one. A step that had nothing to learn from has no dump."""
    earlier = [dump.path.with_name(checkpoint_folders.name(step)) for step in range(first, dump.step)]
    return [*(dumps.read_dump(path) for path in earlier if path.is_dir()), dump]


def _again(dump: Dump, share: DumpShare, policy: Any, reference: Any, reward_model: Any) -> dict[str, float]:
    """Metrics of the step, in which the policy is given what it was given; and how far that is from what it is now."""
    token_weights, metrics = reward_model.update(share.batch)
    gaps = {"given/token_weights": _gap(share.token_weights.values, token_weights.values)}
    if "policy/skipped" in dump.metrics:
        gaps["given/reference_logp"] = _gap(share.reference_logp, reference.score(share.batch))
        metrics |= policy.update(share.batch, share.reference_logp, share.token_weights)
    return metrics | {name: max(distributed.all_gather_object(gap)) for name, gap in gaps.items()}


def _gap(given: TokenValues | None, now: TokenValues | None) -> float:
    """The largest difference, infinite where only one is a number; 0 on ranks that have no such values."""
    if not given or not now:
        return 0.0
    old, new = torch.cat(given), torch.cat(now)
    gap = torch.where(old.isnan() & new.isnan(), 0.0, (old - new).abs())
    return float(torch.cat([gap.new_zeros(1), gap]).nan_to_num(nan=math.inf, posinf=math.inf).max())


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of the step, as it was and as it is now."""

    name: str
    before: float
    now: float
    difference: float  # relative
    same: bool


def compare(before: dict[str, float], now: dict[str, float], tolerance: float) -> list[Row]:
    """Rows of all that was computed again; differences from what was given should be 0."""
    rows = []
    for name, value in now.items():
        old = before.get(name, 0.0 if name.startswith("given/") else math.nan)
        difference = value if name.startswith("given/") else relative(old, value)
        rows.append(Row(name, old, value, difference, difference <= tolerance))
    return rows


def relative(one: float, other: float) -> float:
    """Relative difference; 0 of two nans and of equal infinities."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / max(abs(one), abs(other))
    return difference if math.isfinite(difference) else math.inf


def print_table(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    for column in ("", "dumped", "computed again", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row.name, f"{row.before:.9g}", f"{row.now:.9g}", f"{row.difference:.2g}" if row.difference else "0"
        )
    Console(width=150).print(table)
    worst = max(rows, key=lambda row: row.difference)
    if any(row.difference and row.name.endswith("/updates") for row in rows):
        print("the weights are not those of the step: there are no dumps of some steps since the checkpoint")
    if not worst.difference:
        print("reproduced bit for bit")
    else:
        done = "reproduced" if worst.same else "not reproduced"
        print(f"{done}: the largest relative difference is {worst.difference:.3g}, of {worst.name}")

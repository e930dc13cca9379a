"""`oreal plan --rehearse`: build and run some ranks of the world without data, and compare their communication."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import rehearse_rank
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.tables import simple_table
from oreal_megatron.plan import activations, matching, memory, report_tables, synthetic, timing
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import consecutive
from oreal_megatron.reshard.planner import BUFFERS

PARTS = ("parameters", "gradients", "optimizer", "average")  # of a model's memory; the average of a moving reference
FAULTS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Ranks that ran a step, ranks that were only built, and errors of the others."""

    ran: list[rehearse_rank.RankRehearsal]
    built: list[rehearse_rank.RankRehearsal]
    errors: list[str]


def run(scenario: Scenario, ranks: str | None, console: Console) -> dict[str, Any]:
    """Rehearse ranks ("R,R,..." or None), print the checks, and return them as JSON values."""
    begin = time.monotonic()
    if scenario.arch.experts:
        raise ConfigError("--rehearse: the routing of a mixture of experts depends on data, and a rehearsal has none")
    rehearsal = play(scenario, _parse_ranks(scenario, ranks))
    results = {"every rank is built and runs": rehearsal.errors}
    results |= checks(scenario, rehearsal) if not rehearsal.errors else {}
    seconds = time.monotonic() - begin
    _print_results(scenario, rehearsal, results, seconds, console)
    return {
        "ranks": [rank.rank for rank in rehearsal.ran],
        "faults": {what: faults for what, faults in results.items() if faults},
        "seconds": seconds,
        "bytes": {rank.rank: rank.bytes for rank in rehearsal.ran},
        "kept_activations": {rank.rank: rank.activation_bytes for rank in rehearsal.ran},
    }


def _parse_ranks(scenario: Scenario, text: str | None) -> list[int]:
    if not text:
        return synthetic.default_ranks(scenario)
    try:
        ranks = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ConfigError(f"--ranks {text}: expected numbers separated by commas") from None
    if outside := [rank for rank in ranks if not 0 <= rank < scenario.world]:
        raise ConfigError(f"--ranks names rank {outside[0]}; there are 0 to {scenario.world - 1}")
    return ranks


def play(scenario: Scenario, ranks: Iterable[int]) -> Rehearsal:
    """Run a step of these ranks; build the others of one replica, for the checkpoint."""
    rehearsal, running, samples = Rehearsal([], [], []), set(ranks), synthetic.samples(scenario)
    everyone = sorted(running | set(synthetic.one_replica(scenario)))
    with Bar("rehearsing ranks", len(everyone)) as bar:
        for rank in everyone:
            rank_samples, results = (samples, rehearsal.ran) if rank in running else ([], rehearsal.built)
            try:
                results.append(
                    rehearse_rank.rehearse(scenario.arch, scenario.config, scenario.world, rank, rank_samples)
                )
            except Exception as error:  # Megatron would raise it on the cluster, too
                rehearsal.errors.append(f"rank {rank}: {type(error).__name__}: {error}")
            bar.advance()
    return rehearsal


def checks(scenario: Scenario, rehearsal: Rehearsal) -> dict[str, list[str]]:
    """Return the faults of each check."""
    everyone = sorted([*rehearsal.ran, *rehearsal.built], key=lambda built: built.rank)
    calls, engine = sum(len(rank.calls) for rank in rehearsal.ran), scenario.config.engine
    replica, first = set(synthetic.one_replica(scenario)), rehearsal.ran[0]
    split = f" in {len(first.mini_batches)} mini-batches" if len(first.mini_batches) > 1 else ""
    writers = [rank for rank in everyone if rank.rank in replica]
    results = {
        f"process groups: the same {len(everyone[0].groups)}, in the same order": matching.groups(everyone),
        f"collectives: the same order and sizes in every group, of {calls} calls": matching.collectives(rehearsal.ran),
        "messages between pipeline stages: sends match receives": matching.messages(rehearsal.ran),
        f"packing: {len(first.tokens)} micro-batches{split} on every rank": matching.micro_batches(rehearsal.ran),
        f"checkpoint: every element of every tensor is written once, {written(writers) / 1e9:.1f} GB": (
            matching.checkpoint(everyone)
        ),
    }
    if engine.transport == "direct" and not scenario.arch.experts:
        itemsize, batch = activations.ITEMSIZE[scenario.config.engine_dtype], engine.buffer_mib * 2**20 // BUFFERS
        results["weight sync: both ends agree, every slice lies in a tensor"] = matching.weight_sync(
            timing.layout(scenario), rehearsal.ran, itemsize, batch
        )
    return {what: list(faults) for what, faults in results.items()}


def written(ranks: Iterable[rehearse_rank.RankRehearsal]) -> int:
    """Return the bytes of a checkpoint that these ranks write."""
    return sum(shard.bytes for rank in ranks for shard in rank.shards if shard.written)


def _print_results(
    scenario: Scenario, rehearsal: Rehearsal, results: dict[str, list[str]], seconds: float, console: Console
) -> None:
    names = ", ".join(str(rank.rank) for rank in rehearsal.ran)
    report_tables.print_text(
        console,
        f"\nrehearsed a step of ranks {names} of {scenario.world}, and built {len(rehearsal.built)} more to complete "
        f"one replica, in {seconds:.0f} s",
    )
    for what, faults in results.items():
        console.print(f"  {'[red]FAULT[/]' if faults else '[green]ok[/]   '} {what}", highlight=False)
        for fault in faults[:FAULTS_SHOWN]:
            report_tables.print_text(console, f"    {fault}")
        if len(faults) > FAULTS_SHOWN:
            report_tables.print_text(console, f"    and {len(faults) - FAULTS_SHOWN} more")
    if rehearsal.ran:
        console.print(_size_table(scenario, rehearsal.ran))


def _size_table(scenario: Scenario, ran: list[rehearse_rank.RankRehearsal]) -> Table:
    """Return a table of planned sizes beside those of the rehearsal."""
    table = simple_table("GiB, planned / built")
    for column in ("rank", "model", *PARTS, "saved activations"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for rank in ran:
        stage = rank.rank // (scenario.world // scenario.config.parallel.pipeline)
        for name, parts in rank.bytes.items():
            planned = memory.model_bytes(scenario, stage, scenario.roles[name])
            planned["average"] = 4 * scenario.elements(stage, "lm")  # of a moving reference
            pairs: list[tuple[float, float]] = [
                (planned[part], parts[part]) if part in parts else (0, 0) for part in PARTS
            ]
            if rank.activation_bytes.get(name):
                pairs.append((_saved_bytes(scenario, stage, rank, name), rank.activation_bytes[name]))
            cells = [f"{expected / 2**30:.2f} / {actual / 2**30:.2f}" if actual else "" for expected, actual in pairs]
            table.add_row(str(rank.rank), name, *cells)
    return table


def _saved_bytes(scenario: Scenario, stage: int, rank: rehearse_rank.RankRehearsal, model: str) -> float:
    """Return the planned bytes of saved activations in the largest update of a model."""
    updates = consecutive(rank.mini_batches) if model == "policy" else [slice(None)]
    return max(activations.saved_bytes_for(scenario.arch, scenario.config, stage, rank.tokens[own]) for own in updates)

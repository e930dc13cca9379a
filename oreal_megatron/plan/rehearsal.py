"""`oreal plan --rehearse`: build and run some ranks of the real world without data, and compare what they would say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import gpt_model, rehearse_rank
from oreal_megatron.observe.progress import Bar
from oreal_megatron.plan import activations, matching, memory, report_tables, synthetic, timing
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.reshard.planner import BUFFERS

FAULTS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Ranks that ran a step, ranks that were only built, and why others could not be."""

    played: list[rehearse_rank.RankRehearsal]
    built: list[rehearse_rank.RankRehearsal]
    broken: list[str]


def run(case: Scenario, wanted: str | None, console: Console) -> dict[str, Any]:
    """Rehearse, say what was compared and found, and the same as plain values."""
    begin = time.monotonic()
    if case.arch.experts:
        raise ConfigError("--rehearse: where a mixture of experts sends its tokens depends on data, and there is none")
    gpt_model.transformer_config(case.arch, case.config)  # refuses what Megatron would
    done = play(case, _ranks(case, wanted))
    found = {"every rank can be built, and run": done.broken} | (checks(case, done) if not done.broken else {})
    seconds = time.monotonic() - begin
    _show(case, done, found, seconds, console)
    return {
        "ranks": [one.rank for one in done.played],
        "faults": {what: faults for what, faults in found.items() if faults},
        "seconds": seconds,
        "bytes": {one.rank: one.bytes for one in done.played},
        "kept_activations": {one.rank: one.activation_bytes for one in done.played},
    }


def _ranks(case: Scenario, wanted: str | None) -> list[int]:
    if not wanted:
        return synthetic.chosen(case)
    try:
        ranks = sorted({int(text) for text in wanted.split(",")})
    except ValueError:
        raise ConfigError(f"--ranks {wanted}: wanted numbers with commas between") from None
    if bad := [rank for rank in ranks if not 0 <= rank < case.world]:
        raise ConfigError(f"--ranks names rank {bad[0]}; there are 0 to {case.world - 1}")
    return ranks


def play(case: Scenario, ranks: Iterable[int]) -> Rehearsal:
    """A step of these ranks; the others of one replica are built, for the checkpoint."""
    done, playing, samples = Rehearsal([], [], []), set(ranks), synthetic.samples(case)
    everyone = sorted(playing | set(synthetic.one_replica(case)))
    with Bar("rehearsing ranks", len(everyone)) as bar:
        for rank in everyone:
            here, to = (samples, done.played) if rank in playing else ([], done.built)
            try:
                to.append(rehearse_rank.rehearse(case.arch, case.config, case.world, rank, here))
            except Exception as error:  # what Megatron raises here it would raise on the cluster
                done.broken.append(f"rank {rank}: {type(error).__name__}: {error}")
            bar.advance()
    return done


def checks(case: Scenario, done: Rehearsal) -> dict[str, list[str]]:
    """Faults, by what was looked at."""
    everyone = sorted([*done.played, *done.built], key=lambda one: one.rank)
    calls, engine = sum(len(one.calls) for one in done.played), case.config.engine
    replica = set(synthetic.one_replica(case))
    writers = [one for one in everyone if one.rank in replica]
    found = {
        f"process groups: the same {len(everyone[0].groups)}, in the same order": matching.groups(everyone),
        f"collectives: the same order and sizes in every group, of {calls} calls": matching.collectives(done.played),
        "messages between pipeline stages: sent as they are waited for": matching.messages(done.played),
        f"packing: {len(done.played[0].tokens)} micro-batches on every rank": matching.micro_batches(done.played),
        f"checkpoint: every element of every tensor is written once, {written(writers) / 1e9:.1f} GB": (
            matching.checkpoint(everyone)
        ),
    }
    if engine.transport == "direct" and not case.arch.experts:
        itemsize, batch = activations.ITEMSIZE[case.config.engine_dtype], engine.buffer_mib * 2**20 // BUFFERS
        found["transfer to the engine: both ends agree, every slice lies in a tensor"] = matching.handover(
            timing.layout(case), done.played, itemsize, batch
        )
    return {what: list(faults) for what, faults in found.items()}


def written(ranks: Iterable[rehearse_rank.RankRehearsal]) -> int:
    """Bytes of a checkpoint that these ranks write."""
    return sum(shard.bytes for one in ranks for shard in one.shards if shard.written)


def _show(case: Scenario, done: Rehearsal, found: dict[str, list[str]], seconds: float, console: Console) -> None:
    names = ", ".join(str(one.rank) for one in done.played)
    report_tables.say(
        console,
        f"\nrehearsed a step of ranks {names} of {case.world}, and built {len(done.built)} more that hold one replica "
        f"with them, in {seconds:.0f} s",
    )
    for what, faults in found.items():
        console.print(f"  {'[red]FAULT[/]' if faults else '[green]sound[/]'} {what}", highlight=False)
        for fault in faults[:FAULTS_SHOWN]:
            report_tables.say(console, f"    {fault}")
        if len(faults) > FAULTS_SHOWN:
            report_tables.say(console, f"    and {len(faults) - FAULTS_SHOWN} more")
    if done.played:
        console.print(_sizes(case, done.played))


def _sizes(case: Scenario, played: list[rehearse_rank.RankRehearsal]) -> Table:
    """What the plan says of these micro-batches, beside what the rehearsal built."""
    shown = report_tables.columns("GiB, planned / built")
    for column in ("rank", "model", "parameters", "gradients", "optimizer", "kept activations"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for one in played:
        stage = one.rank // (case.world // case.config.parallel.pipeline)
        for name, parts in one.bytes.items():
            planned, pairs = memory.held(case, stage, case.roles[name]), []
            if one.activation_bytes.get(name):
                kept = activations.kept_of(case.arch, case.config, stage, one.tokens)
                pairs = [(kept, one.activation_bytes[name])]
            cells = [(planned[part], size) for part, size in parts.items()]
            cells = [f"{one / 2**30:.2f} / {other / 2**30:.2f}" for one, other in cells + pairs]
            shown.add_row(str(one.rank), name, *cells)
    return shown

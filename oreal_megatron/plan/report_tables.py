"""A plan as tables for people, and as a picture."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from oreal_megatron.plan import assumptions, estimate, memory, search
from oreal_megatron.plan.estimate import GIB, Estimate


def show(made: Estimate, console: Console) -> None:
    say(console, headline(made))
    for stage in made.stages:
        console.print(_memory(made, stage))
    say(console, _cache(made))
    console.print(_time(made))
    for line in _moved(made):
        say(console, line)
    say(console, f"assumed, not measured (--assume KEY=VALUE): {_assumed(made.case.assumed)}")
    for sentence in estimate.warnings(made):
        console.print(f"[yellow]warning:[/] {sentence}", highlight=False)
    fits = f"it fits, with {made.spare / GIB:.1f} GiB left" if made.fits else "[bold red]it does not fit[/]"
    fullest = made.fullest
    console.print(f"{fits} in the fullest phase ({fullest.fullest}, stage {fullest.number})", highlight=False)


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


def headline(made: Estimate) -> str:
    case, config = made.case, made.case.config
    nodes = -(-case.world // case.node)
    return (
        f"{config.model.path} on {case.world} x {case.gpu.name} ({nodes} machine{'s' if nodes > 1 else ''}), "
        f"{config.model.dtype}: {layout(made)}"
    )


def layout(made: Estimate) -> str:
    cut, config = made.case.config.parallel, made.case.config
    parts = [f"tensor {cut.tensor}" + (" with sequence" if cut.sequence else ""), f"pipeline {cut.pipeline}"]
    parts += [f"virtual {cut.virtual}"] * (cut.virtual > 1) + [f"context {cut.context}"] * (cut.context > 1)
    recompute = config.megatron.get("recompute_granularity", "no")
    return (
        f"{', '.join(parts)}, data {made.case.data}; engine {config.engine.tensor} x {made.case.replicas}; "
        f"{recompute} recomputation, offload {'on' if config.offload else 'off'}"
    )


def _memory(made: Estimate, stage: memory.Stage) -> Table:
    one = len(made.stages) == 1
    table = columns(f"GiB on each rank{'' if one else f' of pipeline stage {stage.number}'}")
    table.add_column("phase", no_wrap=True)
    for column in (*memory.COMPONENTS, "all", "left"):
        table.add_column(column, justify="right")
    for phase, parts in stage.phases.items():
        left = (made.case.usable - parts.total()) / GIB
        cells = [f"{parts[name] / GIB:.1f}" if parts[name] else "" for name in memory.COMPONENTS]
        style = "red" if left < 0 else "yellow" if left * GIB < made.case.assumed.thin * made.case.usable else None
        table.add_row(phase, *cells, f"{parts.total() / GIB:.1f}", f"{left:.1f}", style=style)
    return table


def columns(title: str) -> Table:
    return Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip


def _cache(made: Estimate) -> str:
    case, generation = made.case, made.generation
    tokens = case.config.engine.kv_cache_gib * GIB / case.cache_token()
    return (
        f"KV cache: {case.config.engine.kv_cache_gib:g} GiB a rank hold {tokens:,.0f} tokens of a replica; at most "
        f"{made.largest_cache / GIB:.1f} GiB would fit. Of a replica's {generation.answers:.0f} answers "
        f"{generation.concurrent:.0f} run at once: {generation.concurrent * case.sequence_tokens:,.0f} tokens"
    )


def _time(made: Estimate) -> Table:
    table = columns("seconds of a step (estimated)")
    for column in (*made.seconds, "step", "tokens/s/GPU"):
        table.add_column(column, justify="right")
    seconds = (f"{value:.1f}" for value in made.seconds.values())
    table.add_row(*seconds, f"{made.step_seconds:.0f}", f"{made.tokens_per_gpu_second:.0f}")
    return table


def _moved(made: Estimate) -> list[str]:
    moved, case = made.transfer, made.case
    written, seconds = made.checkpoint
    host = ", ".join(f"{size / GIB:.0f} GiB for {what}" for what, size in made.host.items() if size)
    return [
        f"decoding is bound by {made.generation.bound}; {case.micro_batches} micro-batches of "
        f"{case.config.tokens_per_micro_batch} tokens for each replica of the trainer",
        f"resharding ({moved.transport}): the busiest rank receives {moved.received / 1e9:.2f} GB, "
        f"{moved.received_between / 1e9:.2f} of them between machines; all ranks together "
        f"{moved.all_between / 1e9:.1f} GB between machines",
        f"{case.config.steps} steps take about {made.hours:.1f} hours with their checkpoints, without evaluations",
        f"checkpoint: {written / 1e9:.0f} GB, about {seconds:.0f} s, every {case.config.checkpoint.every} steps, "
        f"{case.config.checkpoint.keep} kept",
        f"memory of a machine: {host}",
    ]


def _assumed(assumed: assumptions.Assumptions) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in dataclasses.asdict(assumed).items())


def describe_assumptions() -> str:
    """Every assumption with what it means, for the help text."""
    lines = inspect.getsource(assumptions.Assumptions).splitlines()
    return "\n".join(line.strip() for line in lines if ": float" in line)


def show_search(found: list[Estimate], console: Console) -> None:
    if not found:
        say(
            console,
            "no layout fits with a margin; more GPUs, larger ones, or a smaller engine.max_model_len are needed",
        )
        return
    table = columns("layouts, best first")
    for column in ("", "layout", "kv_cache_gib", "s/step", "why"):
        table.add_column(column, justify="right" if column in ("", "kv_cache_gib", "s/step") else "left")
    for place, one in enumerate(found, 1):
        cache = f"{one.case.config.engine.kv_cache_gib:.0f}"
        table.add_row(str(place), layout(one), cache, f"{one.step_seconds:.0f}", search.reason(one))
    console.print(table)


def draw(made: Estimate, path: Path) -> None:
    """Memory of each phase on the fullest stage as stacked bars, with the GPU's memory as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = made.fullest.phases
    figure, axes = plt.subplots(figsize=(9, 4.2))
    below = [0.0] * len(phases)
    for color, name in enumerate(memory.COMPONENTS):
        sizes = [parts[name] / GIB for parts in phases.values()]
        if any(sizes):
            axes.bar(list(phases), sizes, bottom=below, label=name, color=f"C{color}", width=0.7)
        below = [one + other for one, other in zip(below, sizes, strict=True)]
    axes.axhline(made.case.usable / GIB, color="black", linestyle="--", linewidth=1, label="usable")
    axes.set(ylabel="GiB on a rank", title=f"stage {made.fullest.number}: {layout(made)}")
    axes.title.set_fontsize(9)
    axes.tick_params(axis="x", labelsize=9)
    axes.legend(fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""A plan as text and tables of the terminal's width, and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oreal_megatron.observe.tables import simple_table
from oreal_megatron.plan import assumptions, estimate, memory, search
from oreal_megatron.plan.estimate import GIB, Estimate
from oreal_megatron.plan.scenario import Scenario


def print_estimate(plan: Estimate, console: Console) -> None:
    """Print the whole plan."""
    print_text(console, headline(plan))
    for stage in plan.stages:
        console.print(_memory_table(plan, stage))
    print_text(console, _kv_cache(plan))
    console.print(_time_table(plan))
    if plan.distillation:
        print_text(console, _distillation_line(plan))
    for line in _traffic_lines(plan):
        print_text(console, line)
    print_text(console, f"assumed, not measured (--assume KEY=VALUE): {_assumptions(plan.scenario.assumed)}")
    for message in estimate.warnings(plan):
        console.print(f"[yellow]warning:[/] {message}", highlight=False)
    fits = f"it fits, with {plan.spare / GIB:.1f} GiB left" if plan.fits else "[bold red]it does not fit[/]"
    fullest = plan.fullest
    console.print(f"{fits} in the fullest phase ({fullest.fullest}, stage {fullest.number})", highlight=False)


def print_text(console: Console, text: str) -> None:
    """Print a text as it is, wrapped at the console's width."""
    console.print(text, highlight=False, markup=False)


def headline(plan: Estimate) -> str:
    """Return model, GPUs and layout as text."""
    scenario, config = plan.scenario, plan.scenario.config
    nodes = -(-scenario.world // scenario.node)
    return (
        f"{config.model.path} on {scenario.world} x {scenario.gpu.name} ({nodes} node{'s' if nodes > 1 else ''}), "
        f"{config.model.dtype}: {describe_layout(plan)}"
    )


def describe_layout(plan: Estimate) -> str:
    """Return the layout of trainer and engine as text."""
    layout, config = plan.scenario.config.parallel, plan.scenario.config
    parts = [f"tensor {layout.tensor}" + (" with sequence" if layout.sequence else ""), f"pipeline {layout.pipeline}"]
    parts += [f"virtual {layout.virtual}"] * (layout.virtual > 1)
    parts += [f"context {layout.context}"] * (layout.context > 1)
    recompute = config.megatron.get("recompute_granularity", "no")
    return (
        f"{', '.join(parts)}, data {plan.scenario.data}; engine {config.engine.tensor} x {plan.scenario.replicas}; "
        f"{recompute} recomputation, offload {'on' if config.offload else 'off'}"
    )


def _memory_table(plan: Estimate, stage: memory.Stage) -> Table:
    """Return one row per component and one column per phase; phases without a margin are coloured."""
    title = "GiB on each rank" + (f" of pipeline stage {stage.number}" if len(plan.stages) > 1 else "")
    table = simple_table(f"\n{title}")
    table.add_column("", no_wrap=True)
    left = {phase: plan.scenario.usable - parts.total() for phase, parts in stage.phases.items()}
    margin = plan.scenario.assumed.thin * plan.scenario.usable
    for phase in stage.phases:
        style = "red" if left[phase] < 0 else "yellow" if left[phase] < margin else None
        table.add_column(phase.replace("_", "\n"), justify="right", style=style)
    for name in memory.COMPONENTS:
        sizes = [parts[name] for parts in stage.phases.values()]
        if any(sizes):
            table.add_row(name, *(f"{size / GIB:.1f}" if size else "" for size in sizes))
    table.add_row("all", *(f"{parts.total() / GIB:.1f}" for parts in stage.phases.values()), style="bold")
    table.add_row("left", *(f"{size / GIB:.1f}" for size in left.values()))
    return table


def _kv_cache(plan: Estimate) -> str:
    scenario, generation = plan.scenario, plan.generation
    tokens = scenario.config.engine.kv_cache_gib * GIB / scenario.cache_token()
    return (
        f"KV cache: {scenario.config.engine.kv_cache_gib:g} GiB per rank hold {tokens:,.0f} tokens of a replica; at "
        f"most {plan.largest_cache / GIB:.1f} GiB would fit. {generation.concurrent:.0f} of {generation.rollouts:.0f} "
        f"rollouts per replica run at once: {generation.concurrent * scenario.sequence_tokens:,.0f} tokens"
    )


def _time_table(plan: Estimate) -> Table:
    table = simple_table("\nseconds per step (estimated)")
    for column in (*plan.seconds, "step", "tokens/s/GPU"):
        table.add_column(column.replace("_", "\n").replace("s/GPU", "s\n/GPU"), justify="right")
    seconds = (f"{value:.1f}" for value in plan.seconds.values())
    table.add_row(*seconds, f"{plan.step_seconds:.0f}", f"{plan.tokens_per_gpu_second:.0f}")
    return table


def _distillation_line(plan: Estimate) -> str:
    passes = ", ".join(f"{name} {seconds:.1f}" for name, seconds in plan.distillation.items())
    return f"oreal distill: {sum(plan.distillation.values()):.1f} s per step (estimated): {passes}"


def _traffic_lines(plan: Estimate) -> Iterator[str]:
    """Yield lines about decoding, weight sync, run time, checkpoints and host RAM."""
    transfer, scenario = plan.transfer, plan.scenario
    config, (size, seconds) = scenario.config, plan.checkpoint
    yield (
        f"decoding is limited by {plan.generation.bound}; {scenario.micro_batches} micro-batches of "
        f"{config.tokens_per_micro_batch} tokens per data-parallel replica"
    )
    yield (
        f"weight sync ({transfer.transport}): the busiest rank receives {transfer.received / 1e9:.2f} GB, "
        f"{transfer.received_between / 1e9:.2f} GB of it between nodes; all ranks together "
        f"{transfer.all_between / 1e9:.1f} GB between nodes"
    )
    yield f"{config.steps} steps take about {plan.hours:.1f} hours with checkpoints, without evaluations"
    yield (
        f"checkpoint: {size / 1e9:.0f} GB, about {seconds:.0f} s, every {config.checkpoint.every} steps, "
        f"{config.checkpoint.keep} kept"
    )
    yield "host RAM per node: " + ", ".join(
        f"{need / GIB:.0f} GiB for {use}" for use, need in plan.host.items() if need
    )


def _assumptions(assumed: assumptions.Assumptions) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in dataclasses.asdict(assumed).items())


def print_search(layouts: Sequence[Estimate], recipe: Scenario, console: Console) -> None:
    """Print the layouts found, with the assignments that select each."""
    if not layouts:
        print_text(
            console, "no layout fits with a margin; use more GPUs, larger ones, or a smaller engine.max_model_len"
        )
        return
    print_text(console, "\nlayouts, best first by seconds per step; each line ends in the settings that select it")
    for number, layout in enumerate(layouts, 1):
        cache = layout.scenario.config.engine.kv_cache_gib
        times = f"{search.printed_seconds(layout):g} s/step, KV cache {cache:.0f} GiB; {search.reason(layout)}"
        options = " ".join(f"--set {assignment}" for assignment in search.overrides(layout, recipe))
        line = f"{number}. {describe_layout(layout)}: {times}: {options or 'the layout of the recipe'}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # one line, to be copied
        for message in estimate.warnings(layout):
            console.print(Padding(Text.from_markup(f"[yellow]warning:[/] {message}"), (0, 0, 0, 3)))


def draw(plan: Estimate, path: Path) -> None:
    """Draw the memory of each phase on the fullest stage as stacked bars, with the GPU's memory as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = plan.fullest.phases
    figure, axes = plt.subplots(figsize=(9, 4.2))
    labels = [phase.replace("_", "\n") for phase in phases]
    below = [0.0] * len(phases)
    for color, name in enumerate(memory.COMPONENTS):
        sizes = [parts[name] / GIB for parts in phases.values()]
        if any(sizes):
            axes.bar(labels, sizes, bottom=below, label=name, color=f"C{color}", width=0.7)
        below = [base + size for base, size in zip(below, sizes, strict=True)]
    axes.axhline(plan.scenario.usable / GIB, color="black", linestyle="--", linewidth=1, label="usable")
    axes.set(ylabel="GiB on a rank", title=f"stage {plan.fullest.number}: {describe_layout(plan)}")
    axes.title.set_fontsize(9)
    axes.tick_params(axis="x", labelsize=9)
    axes.legend(fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

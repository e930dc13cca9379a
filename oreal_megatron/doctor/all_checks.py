"""All checks of `oreal doctor` in their order, and the table of their results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from oreal_megatron import settings
from oreal_megatron.config import ConfigError
from oreal_megatron.doctor import checks
from oreal_megatron.doctor.checks import ABSENT, FAILED, OK, WARNING, CheckResult
from oreal_megatron.doctor.real_run_launcher import launch_real_runs
from oreal_megatron.observe.tables import simple_table

COLOURS = {OK: "green", WARNING: "yellow", FAILED: "bold red", ABSENT: "dim"}


def run_checks(recipe: str | None, assignments: list[str], quick: bool, processes: int = 0) -> Iterator[CheckResult]:
    """Check the machine, what a recipe needs if one is given, and unless `quick` the real runs in so many processes."""
    yield from checks.software()
    config = None
    if recipe:
        try:
            config = settings.load(recipe, assignments)
        except ConfigError as error:
            yield CheckResult("recipe", FAILED, str(error))
    yield from checks.machine(Path(config.run if config else "."))
    if config:
        # The layout is checked against the world the recipe was written for, neither against this one process nor
        # against the number of pods, which Kubeflow puts there.
        os.environ["WORLD_SIZE"] = str(config.gpus or 1)
        yield from checks.inputs(config)
        yield from checks.judges(config.verify.judge)
    if not quick:
        yield from launch_real_runs(processes)


def print_results(results: Sequence[CheckResult]) -> None:
    """Print the results as a table of the terminal's width."""
    table = simple_table("")
    for column in ("check", "state", "detail", "fix"):
        table.add_column(column, overflow="fold")
    for result in results:
        state = f"[{COLOURS[result.state]}]{result.state}[/]"
        table.add_row(result.name, state, escape(result.detail), escape(result.fix))
    Console().print(table)

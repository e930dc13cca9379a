"""`oreal plan RECIPE`: memory, time and traffic of a run before it starts; layouts that fit; a rehearsal."""

from __future__ import annotations

import argparse
import json
import textwrap

from rich.console import Console

from oreal_megatron import settings
from oreal_megatron.cli.arguments import at_least, output_file, refuse_alone
from oreal_megatron.config import ConfigError, validate
from oreal_megatron.models import architecture
from oreal_megatron.plan import assumptions, estimate, gpus, published, report_tables, rollout_report, search
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.runtime import files
from oreal_megatron.runtime.exit_codes import UNFIT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        textwrap.fill(line, 78, subsequent_indent="    ")
        for line in [
            f"exit codes: 0 it fits, 2 an impossible layout, {UNFIT} it does not fit or a rehearsal reported a fault",
            "assumptions:",
            *assumptions.describe().splitlines(),
        ]
    )
    parser.add_argument("recipe", help="FILE.py:FUNCTION, which returns a Config; FILE.py alone if it holds one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. parallel.pipeline=2")
    parser.add_argument("--gpus", type=at_least(1), metavar="N", help="GPUs in total; default: those of the recipe")
    parser.add_argument("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--gpu", default="h100-80g", metavar="KIND", help=f"{', '.join(gpus.GPUS)}; default %(default)s"
    )
    parser.add_argument("--assume", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="see below")
    parser.add_argument("--search", action="store_true", help="list the layouts that fit, best first")
    parser.add_argument("--rehearse", action="store_true", help="build and run some ranks of this world without data")
    parser.add_argument("--ranks", metavar="R,R,...", help="ranks to rehearse; default: two of each kind of group")
    parser.add_argument(
        "--rollouts",
        nargs="?",
        const="",
        metavar="RUN",
        help="simulate policies for the long tail of response lengths; RUN: with the lengths of that run's rollouts",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--picture", type=output_file, metavar="FILE", help="draw the memory of each phase")
    parser.add_argument("--timeline", type=output_file, metavar="FILE", help="draw the replicas' work of --rollouts")


def run(args: argparse.Namespace) -> int:
    """Print the plan; return the exit code."""
    console = Console()
    scenario = _read_scenario(args, console)
    try:
        plan = estimate.estimate_recipe(scenario)
    except ConfigError:
        if args.search:  # this layout is impossible, others may fit
            report_tables.print_search(search.best_layouts(scenario), scenario, console)
        raise
    report_tables.print_estimate(plan, console)
    document = plan.as_dict()
    if args.search:
        layouts = search.best_layouts(scenario)
        report_tables.print_search(layouts, scenario, console)
        document["search"] = [search.as_dict(layout, scenario) for layout in layouts]
    if args.rollouts is not None:
        outcomes = rollout_report.simulate(plan, args.rollouts, console)
        document["rollouts"] = [rollout_report.as_dict(outcome) for outcome in outcomes]
        if args.timeline:
            rollout_report.draw(outcomes, args.timeline)
    if args.rehearse:
        from oreal_megatron.plan import rehearsal  # imports Megatron, which takes seconds

        document["rehearsal"] = rehearsal.run(scenario, args.ranks, console)
    if args.json:
        files.set_aside(args.json).write_text(json.dumps(document, indent=2, default=float) + "\n")
    if args.picture:
        report_tables.draw(plan, files.set_aside(args.picture))
    return 0 if plan.fits and not document.get("rehearsal", {}).get("faults") else UNFIT


def _read_scenario(args: argparse.Namespace, console: Console) -> Scenario:
    refuse_alone(args, timeline="rollouts", ranks="rehearse")
    files.refuse_same(args.json, args.picture, args.timeline)
    config = settings.load(args.recipe, args.set)
    validate(config)
    world = args.gpus or config.gpus
    if world < 1:
        raise ConfigError("the recipe does not say how many GPUs it is for; give --gpus N")
    hf, is_local = published.read_config(config.model.path)
    if not is_local:
        report_tables.print_text(console, f"{config.model.path} does not exist here; planned with published shapes")
    arch, assumed = architecture.read(hf), assumptions.with_changes(args.assume)
    gpu, teacher = gpus.find_gpu(args.gpu), published.read_teacher(config)
    return Scenario(config, arch, gpu, world, args.gpus_per_node, assumed, teacher)

"""`oreal plan RECIPE`: memory, time and bytes of a run before a GPU is spent, and its ranks rehearsed without one."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from rich.console import Console

from oreal_megatron import settings
from oreal_megatron.config import ConfigError, validate
from oreal_megatron.models import architecture
from oreal_megatron.plan import assumptions, estimate, gpus, published, report_tables, search
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.runtime.exit_codes import UNFIT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        textwrap.fill(line, 78, subsequent_indent="    ")
        for line in [
            f"exit codes: 0 it fits, 2 an impossible layout, {UNFIT} it does not fit or a rehearsal reported a fault",
            "assumptions:",
            *report_tables.describe_assumptions().splitlines(),
        ]
    )
    parser.add_argument("recipe", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. parallel.pipeline=2")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in total; default: those of the recipe")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--gpu", default="h100-80g", metavar="KIND", help=f"{', '.join(gpus.GPUS)}; default %(default)s"
    )
    parser.add_argument("--assume", action="append", default=[], metavar="KEY=VALUE", help="see the list below")
    parser.add_argument("--search", action="store_true", help="list the layouts that fit, best first")
    parser.add_argument("--rehearse", action="store_true", help="build and run some ranks of this world without data")
    parser.add_argument("--ranks", metavar="R,R,...", help="ranks to rehearse; default: two of each kind of group")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory of each phase")


def run(args: argparse.Namespace) -> int:
    console = Console(width=120, soft_wrap=False)
    case = _case(args, console)
    try:
        made = estimate.make(case)
    except ConfigError:
        if args.search:  # the layout cannot be, but others can
            report_tables.show_search(search.best(case), console)
        raise
    report_tables.show(made, console)
    said = made.as_dict()
    if args.search:
        found = search.best(case)
        report_tables.show_search(found, console)
        said["search"] = [
            {"layout": report_tables.layout(one), "why": search.reason(one)} | one.as_dict() for one in found
        ]
    sound = made.fits
    if args.rehearse:
        from oreal_megatron.plan import rehearsal  # imports Megatron, which takes seconds

        said["rehearsal"] = rehearsal.run(case, args.ranks, console)
        sound = sound and not said["rehearsal"]["faults"]
    if args.json:
        args.json.write_text(json.dumps(said, indent=2, default=float) + "\n")
    if args.picture:
        report_tables.draw(made, args.picture)
    return 0 if sound else UNFIT


def _case(args: argparse.Namespace, console: Console) -> Scenario:
    config = settings.load(args.recipe, args.set)
    validate(config)
    world = args.gpus or config.gpus
    if world < 1:
        raise ConfigError("the recipe does not say how many GPUs it is for; give --gpus N")
    hf, read = published.config(config.model.path)
    if not read:
        report_tables.say(console, f"{config.model.path} is not here; planned with the shapes of the published model")
    arch = architecture.read(hf)
    return Scenario(config, arch, gpus.named(args.gpu), world, args.gpus_per_node, assumptions.changed(args.assume))

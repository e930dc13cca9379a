"""`oreal report RUN ...`: speed and accuracy of runs as tables; a page, and pictures."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from oreal_megatron.cli.arguments import at_least, output_file
from oreal_megatron.config import ConfigError
from oreal_megatron.evaluation import calibration_picture
from oreal_megatron.observe import run_report, speed_report, token_heat_map
from oreal_megatron.observe.page import page, server
from oreal_megatron.observe.token_decoder import token_decoder
from oreal_megatron.runtime import files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="write a page with charts, tables and rollouts of all runs"
    )
    parser.add_argument(
        "--trajectories",
        type=at_least(0),
        default=20,
        metavar="N",
        help="with --html: rollouts of N steps of each run, evenly spread, in the folder FILE_rollouts (default 20)",
    )
    parser.add_argument(
        "--serve", action="store_true", help="with --html: serve the page, and build it again while the runs train"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of --serve; others than this need its token")
    parser.add_argument("--port", type=at_least(0), default=8000, help="port of --serve (default 8000); 0: a free one")
    parser.add_argument("--picture", type=output_file, metavar="FILE", help="draw the learning curves (PNG)")
    parser.add_argument(
        "--calibration", type=output_file, metavar="FILE", help="draw the reward model's calibration (PNG)"
    )
    parser.add_argument(
        "--heat-map",
        type=output_file,
        metavar="FILE",
        help="draw two rollouts coloured by token weight and score (PNG)",
    )
    parser.add_argument("--summary", type=output_file, metavar="FILE", help="write the first run's summary (JSON)")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # Unix time, for examples/quickstart.sh


def run(args: argparse.Namespace) -> int:
    """Print the tables; return the exit code."""
    outputs = (args.html, args.picture, args.calibration, args.heat_map, args.summary)
    files.refuse_same(*outputs)
    if args.serve and not args.html:
        raise ConfigError("--serve needs --html FILE: the page that it builds and serves")
    records = [run_report.read_run(path) for path in args.runs]
    for output in filter(None, outputs):
        files.set_aside(output)
    speeds = [speed_report.summary(record) for record in records]
    for speed in filter(None, speeds):
        speed_report.print_table(speed)
    run_report.print_table(records)
    if args.html and not args.serve:
        print(page.write(records, args.html, args.trajectories))
    if args.picture:
        run_report.draw(records, args.picture)
        print(f"learning curve: {args.picture}")
    if args.calibration:
        calibration_picture.draw(args.runs[0], args.calibration)
        print(f"calibration of {args.runs[0]}: {args.calibration}")
    if args.heat_map:
        decode = token_decoder(records[0].config["model"]["path"])
        description = token_heat_map.draw(args.runs[0], args.heat_map, decode)
        print(f"token heat map of {args.runs[0]}, {description}: {args.heat_map}")
    if args.summary:
        seconds = time.time() - args.started if args.started else records[0].seconds
        measured = {} if seconds is None else {"seconds": round(seconds, 1)}
        result = run_report.summary(records[0]) | measured | {"speed": speeds[0]}
        args.summary.write_text(json.dumps(result, indent=2) + "\n")
        print(f"summary: {args.summary}")
    if args.serve:
        server.serve(args.runs, args.html, args.trajectories, args.host, args.port)
    return 0

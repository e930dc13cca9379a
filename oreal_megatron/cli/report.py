"""`oreal report RUN ...`: how fast runs were and what they reached, as tables and a learning curve."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from oreal_megatron.observe import report, speed_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="where to draw the learning curves (PNG)")
    parser.add_argument("--summary", type=Path, help="where to write the first run's summary (JSON)")
    parser.add_argument("--started", type=float, help="when the work began (seconds since 1970), for the summary")


def run(args: argparse.Namespace) -> int:
    records = [report.read(path) for path in args.runs]
    speeds = [speed_report.summary(record) for record in records]
    for speed in filter(None, speeds):
        speed_report.print_table(speed)
    report.print_table(records)
    if args.picture:
        report.draw(records, args.picture)
        print(f"learning curve: {args.picture}")
    if args.summary:
        seconds = time.time() - args.started if args.started else records[0].seconds
        args.summary.write_text(
            json.dumps(report.summary(records[0]) | {"seconds": round(seconds, 1), "speed": speeds[0]}, indent=2) + "\n"
        )
        print(f"summary: {args.summary}")
    return 0

"""`oreal evaluate RECIPE`: held-out accuracy of a model, or the pass rates of its training prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from oreal_megatron import heartbeat, prompts, ranks, settings
from oreal_megatron.cli import build
from oreal_megatron.config import ConfigError
from oreal_megatron.evaluation import evaluate
from oreal_megatron.observe import watchdog
from oreal_megatron.observe.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.path=FOLDER")
    parser.add_argument("--rate", metavar="OUT.jsonl", help="sample the training prompts and write them with pass_rate")
    parser.add_argument("--samples", type=int, default=16, help="answers per prompt for --rate (default 16)")


def run(args: argparse.Namespace) -> int:
    config = settings.override(settings.from_recipe(args.recipe), args.set)
    inputs = build.prepare(config)
    if args.rate and not Path(args.rate).resolve().parent.is_dir():
        raise ConfigError(f"--rate {args.rate}: its folder does not exist")
    if args.samples < 1:
        raise ConfigError(f"--samples is {args.samples}; at least one answer per prompt is needed")
    asked = inputs.prompts(config.data.path if args.rate else config.data.held_out)

    from oreal_megatron.mcore import parallel

    parallel.start_process_group(config.watchdog.collective_s)
    watchdog.start(config)
    engine, verifier = build.start_engine(inputs)
    sampling = dataclasses.replace(config.sampling, answers_per_prompt=args.samples) if args.rate else None
    answers = len(asked[engine.replica :: engine.replicas]) * (sampling.answers_per_prompt if sampling else 1)
    with heartbeat.phase("evaluate"), Bar("answers", answers, ranks.rank() == 0) as bar:
        result, rates = evaluate(asked, engine, verifier, config, sampling, bar.advance)
    if ranks.rank() == 0:
        if args.rate:
            lines = prompts.read_problems(config.data.path)
            rated = [lines[prompt.id] | {"pass_rate": rate} for prompt, rate in zip(asked, rates, strict=True)]
            Path(args.rate).write_text("".join(json.dumps(line) + "\n" for line in rated))
        print(f"accuracy {result['accuracy']:.1%} (95 % interval {result['low']:.1%} to {result['high']:.1%}) "
              f"of {result['answers']} answers, {result['unknown']} unknown")  # fmt: skip
    verifier.grader.close()
    with heartbeat.phase("stop"):
        parallel.stop(engine)
    return 0

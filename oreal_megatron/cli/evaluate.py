"""`oreal evaluate MODEL`: benchmarks beside the paper's; `oreal evaluate RECIPE --rate`: pass rates of its prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from oreal_megatron.config import Config, ConfigError, SamplingConfig
from oreal_megatron.data import problems
from oreal_megatron.evaluation import results, suites
from oreal_megatron.evaluation.score import ask, greedy, pass_rates, summary
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.rows import read_rows
from oreal_megatron.observe.run_folder import rollout_row
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed, files, heartbeat, watchdog
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.session import start_engine

BLOCK = 128  # problems that are asked, graded and written down together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, checkpoint of a run, or path/to/file.py:function")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. engine.kv_cache_gib=40")
    parser.add_argument(
        "--suite", metavar="A,B", help=f"of {', '.join(suites.SUITES)}, FILE.jsonl, hub:OWNER/DATASET:FILE.jsonl"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="FOLDER", help="of the suites (default data)"
    )
    parser.add_argument("--problems", type=int, default=0, metavar="N", help="use only the first N of each suite")
    parser.add_argument(
        "--samples", type=int, metavar="K", help="K sampled answers a problem besides the greedy one; 16 with --rate"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: runs/evaluations/NAME, with --rate OUT.jsonl.answers; a second start continues there",
    )
    parser.add_argument("--training", metavar="FILE.jsonl", help="check the suites for contamination with these")
    parser.add_argument("--rate", metavar="OUT.jsonl", help="sample the training prompts and write them with pass_rate")


def run(args: argparse.Namespace) -> int:
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples is {args.samples}; at least one answer per prompt is needed")
    return rate(args) if args.rate else benchmark(args)


def rate(args: argparse.Namespace) -> int:
    """Pass rates of the recipe's training prompts under its model, into a file that it can train on."""
    config, out = results.config_of(args.model, args.set), args.out or Path(args.rate + ".answers")
    inputs = read_inputs(config)
    if not Path(args.rate).resolve().parent.is_dir():
        raise ConfigError(f"--rate {args.rate}: its folder does not exist")
    asked = inputs.prompts(config.data.path)

    from oreal_megatron.mcore import parallel

    parallel.start_process_group(config.watchdog.collective_s)
    watchdog.start(config)
    sampling = dataclasses.replace(config.sampling, rollouts_per_prompt=args.samples or 16)
    results.claim(out, inputs, {"rating": sampling}, {config.data.path: asked})
    engine, verifier = start_engine(inputs)
    with heartbeat.phase("evaluate"):
        rows = answer(config.data.path, asked, "rating", sampling, config, out, engine, verifier)
    if distributed.rank() == 0:
        lines, rates = problems.read_problems(config.data.path), pass_rates(rows)
        rated = [lines[prompt.id] | {"pass_rate": rates[number]} for number, prompt in enumerate(asked)]
        files.write_text(Path(args.rate), "".join(json.dumps(line) + "\n" for line in rated))
        result = summary(rows, config.seed)
        low, high = result["interval"]
        print(f"accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) "
              f"of {len(rows)} answers, {result['unknown']} unknown; all of them: {out}")  # fmt: skip
    verifier.grader.close()
    with heartbeat.phase("stop"):
        parallel.stop(engine)
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """Ask every suite, greedily and in samples; leave responses, results.json and table.md in the folder."""
    from oreal_megatron.mcore import parallel

    config, out = results.config_of(args.model, args.set), args.out or results.default_folder(args.model)
    names = args.suite.split(",") if args.suite else [config.data.held_out]
    found = {name: suites.find(name, args.data) for name in filter(None, names)}
    if not found:
        raise ConfigError("nothing to evaluate on; name suites with --suite")
    if len({Path(name).stem for name in found}) < len(found):
        raise ConfigError(f"two of the suites {', '.join(found)} have one name, and would share a file of responses")
    parallel.start_process_group(config.watchdog.collective_s)
    watchdog.start(dataclasses.replace(config, run=str(out)))
    config = results.with_cache(results.with_weights(config, args.model, out))
    inputs = read_inputs(config)
    whole = {name: suite_prompts(inputs, *suite) for name, suite in found.items()}
    asked = {name: mine[: args.problems or None] for name, mine in whole.items()}
    modes = {"greedy": greedy(config)} | ({"sampled": sampled(config, args.samples)} if args.samples else {})
    results.claim(out, inputs, modes, whole)
    engine, verifier = start_engine(inputs)
    with heartbeat.phase("evaluate"):
        scores = {
            name: {
                mode: summary(answer(name, asked[name], mode, sampling, config, out, engine, verifier), config.seed)
                for mode, sampling in modes.items()
            }
            for name in found
        }
    if distributed.rank() == 0:
        training = args.training or (config.data.path if Path(config.data.path).is_file() else "")
        results.report(out, args.model, scores, overlap(asked, training))
    verifier.grader.close()
    with heartbeat.phase("stop"):
        parallel.stop(engine)
    return 0


def suite_prompts(inputs: Inputs, suite: suites.Suite, path: str) -> list[Prompt]:
    """A suite's problems as training would render them."""
    read = inputs.rendered(path)
    wanted = suites.kept(suite, path)
    return [prompt for prompt in read if prompt.id in wanted]


def sampled(config: Config, samples: int) -> SamplingConfig:
    longest = config.evaluation.max_new_tokens
    return dataclasses.replace(config.sampling, rollouts_per_prompt=samples, max_new_tokens=longest)


def answer(
    name: str,
    asked: list[Prompt],
    mode: str,
    sampling: SamplingConfig,
    config: Config,
    out: Path,
    engine: Any,
    verifier: Any,
) -> list[dict[str, Any]]:
    """Lines of all answers to one suite in one mode; blocks of problems that are written down are not asked again."""
    file = out / f"{Path(name).stem}.{mode}.jsonl"
    rows = sound_blocks(file, len(asked), sampling.rollouts_per_prompt)
    done = {row["problem"] for row in rows}
    with Bar(f"{name}, {mode}", len(asked), distributed.rank() == 0) as bar:
        for start in range(0, len(asked), BLOCK):
            block = asked[start : start + BLOCK]
            if start not in done:
                rollouts, verdicts = ask(block, engine, verifier, sampling, (config.seed, -1 - start))
                fresh = [
                    {"problem": start + slot, **rollout_row(rollout, verdict)}
                    for slot, both in enumerate(zip(rollouts, verdicts, strict=True))
                    for rollout, verdict in zip(*both, strict=True)
                ]
                if distributed.rank() == 0:
                    with open(file, "a") as lines:
                        lines.writelines(json.dumps(row) + "\n" for row in fresh)
                rows += fresh
            bar.advance(len(block))
    return [row for row in rows if row["problem"] < len(asked)]


def sound_blocks(file: Path, problems: int, answers: int) -> list[dict[str, Any]]:
    """The lines of whole blocks in a file of responses, which is left with no others. Collective."""
    if distributed.rank() == 0:
        rows = read_rows(file)
        counts = Counter(row["problem"] // BLOCK for row in rows)
        whole = {block for block, count in counts.items() if count >= answers * min(BLOCK, problems - block * BLOCK)}
        rows = [row for row in rows if row["problem"] // BLOCK in whole]
        files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return distributed.all_gather_object(rows if distributed.rank() == 0 else None)[0]


def overlap(asked: dict[str, list[Prompt]], training: str) -> dict[str, list[int]] | None:
    """Problems of each suite that the training prompts hold as well; None without training prompts."""
    if not training:
        return None
    texts = [line["question"] for line in problems.read_problems(training)]
    return {name: suites.seen([prompt.question for prompt in mine], texts) for name, mine in asked.items()}

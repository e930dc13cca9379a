"""`oreal data merge` and `oreal data skills`: data that a language model behind an OpenAI-compatible API writes."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from oreal_megatron import config
from oreal_megatron.cli.arguments import at_least, output_file
from oreal_megatron.data import merge_attempts, replies, skills
from oreal_megatron.data.replies import Replies

SHOWN_SKILLS = 10


def add_arguments(actions: Any) -> None:
    """Declare the two sub-commands."""
    text = "merge attempts at each problem and a model's critiques of them into one chain, for `oreal sft`"
    merge = actions.add_parser("merge", help=text, description=text)
    merge.add_argument("inputs", nargs="+", metavar="IN", help="rollouts with verdicts: JSONL files or run folders")
    merge.add_argument("output", type=output_file, metavar="OUT.jsonl")
    merge.add_argument("--attempts", type=at_least(2), default=3, metavar="N", help="most of a problem (default 3)")
    merge.add_argument("--server", nargs="+", required=True, metavar="URL", help="OpenAI-compatible servers")
    _add_server_options(merge, max_tokens=8192)
    text = "annotate problems with their core skill, or draw problems of the skills that a run fails"
    skill = actions.add_parser("skills", help=text, description=text)
    skill.add_argument("input", metavar="IN", help="FILE.jsonl, FILE.parquet or hub:OWNER/DATASET:FILE")
    skill.add_argument("output", type=output_file, metavar="OUT.jsonl")
    source = skill.add_mutually_exclusive_group(required=True)
    source.add_argument("--server", nargs="+", metavar="URL", help="annotate by these OpenAI-compatible servers")
    source.add_argument("--failed-in", metavar="RUN", help="draw problems of the skills that this run fails")
    skill.add_argument("--among", type=Path, metavar="FILE", help="the only names of skills, one per line")
    steps = "steps of the run without a correct rollout that make a question failed (default 2)"
    skill.add_argument("--steps", type=at_least(1), default=2, metavar="N", help=steps)
    skill.add_argument("--per-failure", type=at_least(1), default=4, metavar="N", help="problems drawn (default 4)")
    skill.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    _add_server_options(skill, max_tokens=2048)


def _add_server_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--model", default="", metavar="NAME", help="default: the first model of the server")
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=max_tokens, metavar="N", help="of a reply (default %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=at_least(1), default=64, metavar="N", help="requests at once (default 64)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a reply (default 600)")


def _replies(args: argparse.Namespace) -> AbstractContextManager[Replies]:
    settings = config.JudgeConfig(
        urls=tuple(args.server), model=args.model, concurrency=args.concurrency, read_timeout_s=args.timeout
    )
    config.validate(settings)
    return replies.connect(args.output, settings, args.max_tokens)


def merge(args: argparse.Namespace) -> dict[str, int]:
    """Write the chains; return the number of problems by reason."""
    from oreal_megatron.verify.grader import Grader

    with Grader(config.VerifyConfig()) as grader, _replies(args) as model_replies:

        def is_correct(gold: str, chain: str) -> bool:
            return grader.submit(gold, chain).result().outcome.value == "correct"

        return merge_attempts.write_chains(
            args.inputs, args.output, model_replies, is_correct, args.attempts, args.concurrency
        )


def annotate(args: argparse.Namespace) -> dict[str, int]:
    """Write problems with their skills, print the most frequent ones, return the number of lines by reason."""
    names = skills.read_names(args.among) if args.among else []
    with _replies(args) as model_replies:
        counts, by_skill = skills.annotate(args.input, args.output, model_replies, names, args.concurrency)
    listed = ", ".join(f"{name} {count}" for name, count in by_skill.most_common(SHOWN_SKILLS))
    print(f"{len(by_skill)} skills, the most frequent: {listed}")
    return counts


def draw(args: argparse.Namespace) -> None:
    """Write problems of the skills that a run fails, and print how many."""
    failed = skills.failed_questions(args.failed_in, args.steps)
    drawn = skills.draw(args.input, args.output, failed, args.per_failure, args.seed)
    print(
        f"{drawn.failed} questions have no correct rollout in {args.steps} steps or more, {drawn.unlisted} of them are "
        f"not in {args.input}; {drawn.problems} problems of {drawn.skills} skills are in the output"
    )

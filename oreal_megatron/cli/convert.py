"""`oreal convert`: Hugging Face folders to Megatron checkpoints and back, and comparison of two of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console

from oreal_megatron.cli.arguments import at_least
from oreal_megatron.config import ParallelConfig
from oreal_megatron.convert import compare_checkpoints, stream, to_hf, to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.observe.progress import Bar

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DONE, DIFFERENT, MEGABYTE = 0, 1, 10**6  # two exit codes, and bytes
console = Console(stderr=True, soft_wrap=True, highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `oreal convert`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    to_megatron_parser = actions.add_parser(
        "to-megatron", help="Hugging Face folder -> Megatron distributed checkpoint"
    )
    to_megatron_parser.add_argument("source", type=Path, metavar="HF_DIR")
    to_megatron_parser.add_argument("out", type=Path, metavar="OUT")
    for flag, unit in (("--tp", "tensor-parallel ranks"), ("--pp", "pipeline stages"), ("--vpp", "chunks per stage")):
        to_megatron_parser.add_argument(flag, type=at_least(1), default=1, metavar="N", help=f"N {unit} (default 1)")
    to_hf_parser = actions.add_parser("to-hf", help="Megatron distributed checkpoint -> Hugging Face folder")
    to_hf_parser.add_argument("source", type=Path, metavar="CKPT", help="e.g. RUN/checkpoints/step_000090/policy")
    to_hf_parser.add_argument("out", type=Path, metavar="OUT")
    for action in (to_megatron_parser, to_hf_parser):
        action.add_argument("--dtype", choices=DTYPES, default="keep", help="dtype of the output (default: keep)")
    check = actions.add_parser("check", help="exit code 0 when two checkpoints of either kind are equal, else 1")
    check.add_argument("a", type=Path, metavar="A")
    check.add_argument("b", type=Path, metavar="B")
    check.add_argument("--logits", metavar="TEXT", help="compare the logits on this text as well")


def run(args: argparse.Namespace) -> int:
    """Return the exit code: 0 done or equal, 1 different; bad input raises ConfigError (2)."""
    # torch's large buffers in huge pages: the kernel allocates small pages slower than the disk reads.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return {"to-megatron": _to_megatron, "to-hf": _to_hf, "check": _check}[args.action](args)


def _to_megatron(args: argparse.Namespace) -> int:
    source, cast = HFFolder(args.source, tokenizer=False), stream.Cast(DTYPES[args.dtype])
    layout = ParallelConfig(args.tp, args.pp, args.vpp)
    with _ByteBar("to-megatron", to_megatron.size(source, cast)) as bar:
        to_megatron.convert(source, args.out, layout, cast, _report, bar.advance)
    return _print_output(args.out, cast)


def _to_hf(args: argparse.Namespace) -> int:
    source, cast = MegatronFolder(args.source), stream.Cast(DTYPES[args.dtype])
    with _ByteBar("to-hf", to_hf.size(to_hf.shapes(source, cast))) as bar:
        to_hf.convert(source, args.out, cast, _report, bar.advance)
    return _print_output(args.out, cast)


def _check(args: argparse.Namespace) -> int:
    a, b = compare_checkpoints.open_folder(args.a), compare_checkpoints.open_folder(args.b)
    with _ByteBar("check", sum(file.stat().st_size for file in args.a.iterdir() if file.is_file())) as bar:
        difference = compare_checkpoints.first_difference(a, b, bar.advance)
    if difference is None and args.logits is not None:
        from oreal_megatron.session import compare_logits  # imports transformers and Megatron, which takes seconds

        difference = compare_logits.difference(a, b, args.logits)
    print(f"different: {difference}" if difference else f"equal: {args.a} and {args.b}")
    return DIFFERENT if difference else DONE


class _ByteBar(Bar):
    """Progress bar in megabytes that receives bytes."""

    def __init__(self, title: str, total: int):
        super().__init__(f"{title}, MB", total // MEGABYTE)
        self.bytes = 0

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add `count` bytes."""
        self.bytes += count
        super().advance(self.bytes // MEGABYTE - self.done, note)


def _report(text: str) -> None:
    console.print(text)


def _print_output(out: Path, cast: stream.Cast) -> int:
    if cast.summary():
        _report(cast.summary())
    print(out)
    return DONE

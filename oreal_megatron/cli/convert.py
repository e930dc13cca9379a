"""`oreal convert`: Hugging Face folders to Megatron checkpoints and back, and whether two of them are equal."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console

from oreal_megatron.config import ParallelConfig
from oreal_megatron.convert import compare_checkpoints, stream, to_hf, to_megatron
from oreal_megatron.convert.hf_folder import Folder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.observe.progress import Bar

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EQUAL, DIFFERENT = 0, 1  # exit codes of `check`
MEGABYTE = 10**6
console = Console(stderr=True, soft_wrap=True, highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `oreal convert`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    forth = actions.add_parser("to-megatron", help="Hugging Face folder -> Megatron distributed checkpoint")
    forth.add_argument("source", type=Path, metavar="HF_DIR")
    forth.add_argument("out", type=Path, metavar="OUT")
    for short, what in (("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"), ("vpp", "chunks of each stage")):
        forth.add_argument(f"--{short}", type=int, default=1, metavar="N", help=f"cut for N {what} (default 1)")
    back = actions.add_parser("to-hf", help="Megatron distributed checkpoint -> Hugging Face folder")
    back.add_argument("source", type=Path, metavar="CKPT", help="e.g. RUN/checkpoints/step_000090/policy")
    back.add_argument("out", type=Path, metavar="OUT")
    for action in (forth, back):
        action.add_argument("--dtype", choices=DTYPES, default="keep", help="of the output (default: as it is)")
    check = actions.add_parser("check", help="exit code 0 when two checkpoints of either kind are equal, else 1")
    check.add_argument("a", type=Path, metavar="A")
    check.add_argument("b", type=Path, metavar="B")
    check.add_argument("--logits", metavar="TEXT", help="compare the logits on this text as well")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done or equal, 1 different; bad input raises ConfigError (2)."""
    # torch's large buffers in huge pages: the kernel hands out small ones slower than the disk reads.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return {"to-megatron": _to_megatron, "to-hf": _to_hf, "check": _check}[args.action](args)


def _to_megatron(args: argparse.Namespace) -> int:
    source, cast = Folder(args.source, tokenizer=False), stream.Cast(DTYPES[args.dtype])
    layout = ParallelConfig(args.tp, args.pp, args.vpp)
    with _Bytes("to-megatron", to_megatron.size(source, cast)) as bar:
        to_megatron.convert(source, args.out, layout, cast, _say, bar.advance)
    return _done(args.out, cast)


def _to_hf(args: argparse.Namespace) -> int:
    source, cast = MegatronFolder(args.source), stream.Cast(DTYPES[args.dtype])
    with _Bytes("to-hf", to_hf.size(to_hf.shapes(source, cast))) as bar:
        to_hf.convert(source, args.out, cast, _say, bar.advance)
    return _done(args.out, cast)


def _check(args: argparse.Namespace) -> int:
    a, b = compare_checkpoints.open_folder(args.a), compare_checkpoints.open_folder(args.b)
    with _Bytes("check", sum(tensor.stat().st_size for tensor in args.a.iterdir() if tensor.is_file())) as bar:
        difference = compare_checkpoints.first_difference(a, b, bar.advance)
    if difference is None and args.logits is not None:
        from oreal_megatron.session import compare_logits  # imports transformers and Megatron, which takes seconds

        difference = compare_logits.difference(a, b, args.logits)
    print(f"different: {difference}" if difference else f"equal: {args.a} and {args.b}")
    return DIFFERENT if difference else EQUAL


class _Bytes(Bar):
    """A bar that counts megabytes, told bytes."""

    def __init__(self, title: str, total: int):
        super().__init__(f"{title}, MB", total // MEGABYTE)
        self.bytes = 0

    def advance(self, count: int) -> None:
        self.bytes += count
        super().advance(self.bytes // MEGABYTE - self.done)


def _say(text: str) -> None:
    console.print(text)


def _done(out: Path, cast: stream.Cast) -> int:
    if cast.sentence():
        _say(cast.sentence())
    print(out)
    return EQUAL

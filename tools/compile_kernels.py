"""Compile every Triton kernel ahead of time, without a GPU, and print registers, spills and shared memory.

    python tools/compile_kernels.py [--architectures 80 90 100] [--json FILE]

The launch options are those that the kernels run with (oreal_kernels/triton_launch.py). "loop" is the number of
instructions per logit in the main loop of the passes over logits. Exit code 1 if a kernel spills
registers or wants more shared memory than a thread block of the architecture may have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from oreal_kernels import triton_launch
from oreal_kernels.combine import combine_kernel
from oreal_kernels.policy_loss import terms_kernel
from oreal_kernels.rotary import rotary_kernel
from oreal_kernels.row_gradient import gradient_kernel
from oreal_kernels.row_statistics import statistics_kernel
from oreal_kernels.scores_to_weights import BELIEFS, weights_kernel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a thread block may have
INSTRUCTIONS = ("LDG.E.128", "MUFU.EX2")  # loads of 16 bytes; exponentials
TENSORS = dict(logits="bf16", out="fp32", parts="fp32", scores="bf16", weight="fp32")
INTEGERS = ("label_column", "cu_seqlens", "owner")
SCALARS = {
    **dict.fromkeys(
        ("threshold_correct", "threshold_incorrect", "correct_scale", "incorrect_scale", "kl_scale"), "fp32"
    ),
    **dict.fromkeys(("rows", "columns", "all_columns", "tokens", "width"), "i32"),
    **dict.fromkeys(("row_stride", "out_stride", "heads"), "i32"),
    **dict.fromkeys(("x_row_stride", "x_head_stride", "out_row_stride", "out_head_stride"), "i32"),
}


def variants() -> Iterator[tuple[str, str, object, dict, dict]]:
    """Yield row of the table, name in triton_launch.py, kernel, constants, and dtypes that differ from the defaults."""
    parts = dict(PARTS=4)
    for name, cap, dtypes in (("bf16", 0.0, {}), ("fp32", 0.0, dict(logits="fp32")), ("bf16 capped", 30.0, {})):
        vector = 4 if dtypes else 8  # elements of a load of 16 bytes
        yield f"statistics {name}", "statistics", statistics_kernel, dict(**parts, SOFTCAP=cap, VECTOR=vector), dtypes
    for name, entropy, cap, dtypes in (
        ("bf16", False, 0.0, {}),
        ("bf16 with entropy", True, 0.0, {}),
        ("fp32 to bf16", False, 0.0, dict(logits="fp32")),
        ("bf16 capped", False, 30.0, {}),
    ):
        constants = dict(**parts, ENTROPY=entropy, SOFTCAP=cap)
        yield f"gradient {name}", "gradient", gradient_kernel, constants, dict(out="bf16", **dtypes)
    yield "combine 8 ranks", "combine", combine_kernel, dict(PARTS=8), {}
    for belief in BELIEFS:
        constants = dict(PREFIX_MEAN=belief == "prefix_mean")
        yield f"token weights {belief}", "token_weights", weights_kernel, constants, {}
    for name, sign in (("forward", 1.0), ("backward", -1.0)):
        constants = dict(HALF=64, COLUMNS=64, SIGN=sign)
        yield f"rotary {name}", "rotary", rotary_kernel, constants, dict(x="bf16", out="bf16")
    for name, kind in (("k1", 1), ("k3", 3)):
        yield (
            f"policy terms {name}",
            "policy_terms",
            terms_kernel,
            dict(KL_KIND=kind, ADVANTAGE_ON_POSITIVES=True, MAX_DISTANCE=60.0),
            {},
        )


def signature(kernel, constants: dict, dtypes: dict) -> dict[str, str]:
    """Return Triton's type of each argument."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in SCALARS:
            return SCALARS[name]
        if name == "correct":
            return "*u8"
        return "*i64" if name in INTEGERS else "*" + {**TENSORS, **dtypes}.get(name, "fp32")

    return {name: kind(name) for name in kernel.arg_names}


def compile_one(name: str, kernel, constants: dict, dtypes: dict, architecture: int) -> dict:
    """Compile a kernel for an architecture; return shared memory, registers, spills and instructions."""
    options = dict(triton_launch.ON_GPU[name])
    runtime = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in options}
    constants = {**constants, **options}
    types = signature(kernel, constants, dtypes)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    aligned |= {(i,): [["tt.divisibility", 16]] for i, key in enumerate(types) if key.endswith("_stride")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=runtime)
    measured = assembled(compiled.asm["cubin"])
    if name in ("statistics", "gradient"):  # elements of a thread in one round of its loop
        measured["per_element"] = measured["loop"] / (options["BLOCK"] / (32 * runtime["num_warps"]))
    return {"shared": compiled.metadata.shared, **measured}


def assembled(cubin: bytes) -> dict:
    """Return registers, spilled bytes (the stack), counts of some machine instructions, and those of the main loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", file.name)
    counts = {word: len(re.findall(rf"\s{re.escape(word)}\b", code)) for word in INSTRUCTIONS}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": max(int(re.search(rf"{where}:(\d+)", usage)[1]) for where in ("STACK", "LOCAL")),
        "instructions": {word: count for word, count in counts.items() if count},
        "loop": main_loop(code),
        "barriers_in_loop": main_loop(code, "BAR"),
    }


def main_loop(code: str, word: str = "") -> int:
    """Return the instructions (those that contain a word) of the smallest loop that loads 16 bytes; 0 without one."""
    lines = [line for line in code.splitlines() if re.match(r"\.L_x_\d+:|\s+/\*[0-9a-f]+\*/\s", line)]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    loops = []
    for number, line in enumerate(lines):
        target = re.search(r"BRA\S* .*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], number) < number - 1:
            body = [line for line in lines[labels[target[1]] : number + 1] if not line.startswith(".L_x_")]
            if any("LDG.E.128" in line for line in body):
                loops.append(body)
    return sum(word in line for line in min(loops, key=len)) if loops else 0


def run(tool: str, *arguments: str) -> str:
    """Run one of the CUDA tools that Triton ships; return its output."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def faults(rows: list[dict]) -> list[str]:
    """Return a message for each kernel that would not run, or run slowly."""
    messages = []
    for row in rows:
        limit, where = SHARED_MEMORY[row["architecture"]], f"{row['kernel']} on sm_{row['architecture']}"
        if row["shared"] > limit:
            messages.append(f"{where} wants {row['shared']} bytes of shared memory; a block may have {limit}")
        if row["spill_bytes"]:
            messages.append(f"{where} spills {row['spill_bytes']} bytes of registers; use more warps or smaller blocks")
    return messages


def main() -> int:
    """Compile all kernels and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(SHARED_MEMORY), choices=SHARED_MEMORY)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it")
    work = [(variant, architecture) for variant in variants() for architecture in arguments.architectures]
    rows = []
    with tempfile.TemporaryDirectory() as cache:  # a cached result would say nothing about this installation
        os.environ["TRITON_CACHE_DIR"] = cache
        for (title, *kernel), architecture in track(work, "compiling", console=Console(stderr=True)):
            rows.append({"kernel": title, "architecture": architecture, **compile_one(*kernel, architecture)})
    table = Table(title=f"Triton {triton.__version__}, compiled without a GPU")
    for column in ("kernel", "sm", "registers", "spill\nbytes", "shared\nbytes", "loop", "instructions"):
        table.add_column(column, justify="left" if column in ("kernel", "instructions") else "right")
    for row in rows:
        instructions = ", ".join(f"{word} x{count}" for word, count in row["instructions"].items())
        per_element = f"{row['per_element']:.1f}" if "per_element" in row else ""
        numbers = (row["architecture"], row["registers"], row["spill_bytes"], row["shared"], per_element)
        table.add_row(row["kernel"], *map(str, numbers), instructions)
    Console(width=80).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    for message in faults(rows):
        print(message, file=sys.stderr)
    return bool(faults(rows))


if __name__ == "__main__":
    sys.exit(main())

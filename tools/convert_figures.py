"""A 7B-shaped Qwen2.5 with generated values, converted both ways beside a plain `cp` of the same bytes.

    python tools/convert_figures.py FOLDER [--layers N] [--tp N]

Needs 4 x 15.2 GB of disk in FOLDER for the 28 layers of the 7B, and deletes what it wrote. Every figure is of a cold
cache (the source's pages are dropped first) and ends when the output is on the disk (fsync), cp's too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from oreal_megatron.convert.hf_folder import HFFolderWriter
from oreal_megatron.models import architecture, tensors

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
OREAL = [sys.executable, "-m", "oreal_megatron", "convert"]


def generate(folder: Path, layers: int) -> None:
    """A folder of random finite bfloat16 values."""
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    arch, shapes = architecture.read(config), {}
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        shapes |= {name: (torch.bfloat16, shape) for name, shape in tensors.hf_shapes(entry, arch).items()}
    writer, generator = HFFolderWriter(folder, shapes), torch.Generator().manual_seed(0)
    for name, (_, shape) in shapes.items():
        bits = torch.empty(shape, dtype=torch.int16).random_(generator=generator)
        signs = torch.empty(shape, dtype=torch.int16).random_(0, 2, generator=generator)
        writer.write(name, ((bits & 0x3FFF) | (signs << 15)).view(torch.bfloat16))  # below 2 in size
    writer.close()


def forget(folder: Path) -> None:
    """Drop a folder's pages from the cache."""
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(title: str, command: list[str], size: int, *sources: Path) -> float:
    """Run a command from a cold cache; print seconds, throughput and the process's largest resident size."""
    for source in sources:
        forget(source)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    speed, peak = size / seconds / 1e6, usage.ru_maxrss / 2**20
    print(f"{title:32} {seconds:7.1f} s {speed:7.0f} MB/s   peak RSS {peak:5.2f} GiB", flush=True)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28, help="fewer make it smaller (default 28, the 7B)")
    parser.add_argument("--tp", type=int, default=1, help="cut the checkpoint for so many ranks (default 1)")
    parser.add_argument("--generate", action="store_true", help="only write the folder to convert")
    args = parser.parse_args()
    root = args.folder / "convert_figures"
    hf, copy, megatron, back = (root / name for name in ("hf", "copy", "megatron", "back"))
    if args.generate:
        generate(root / "hf", args.layers)
        return 0
    shutil.rmtree(root, ignore_errors=True)
    # In a process of its own: a child's largest resident size begins with its parent's.
    again = [sys.executable, __file__, str(args.folder), "--layers", str(args.layers), "--generate"]
    subprocess.run(again, check=True)
    size = sum(file.stat().st_size for file in hf.iterdir())
    print(f"{args.layers} layers, {size / 1e9:.2f} GB of bfloat16, checkpoint cut for {args.tp} ranks", flush=True)
    cp = measure("cp, then sync", ["sh", "-c", f"cp -r {hf} {copy} && sync {copy}/*"], size, hf)
    shutil.rmtree(copy)
    there = measure("to-megatron", [*OREAL, "to-megatron", str(hf), str(megatron), "--tp", str(args.tp)], size, hf)
    here = measure("to-hf", [*OREAL, "to-hf", str(megatron), str(back)], size, megatron)
    measure("check HF with HF (equal)", [*OREAL, "check", str(hf), str(back)], size, hf, back)
    print(f"to-megatron takes {there / cp:.2f} x cp, to-hf {here / cp:.2f} x cp")
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())

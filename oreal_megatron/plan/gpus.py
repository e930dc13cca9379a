"""GPUs as their makers describe them: data sheets of NVIDIA (A100, H100, H200, H20, B200 of HGX boards, SXM).

Memory is in GiB, as the sheets' "GB" are: an H200 of "141 GB" shows 140.4 GiB. Operations are bf16 without sparsity.
NVLink is of one direction, half of what the sheets print. Between nodes one network card for each GPU is taken, as DGX
and HGX machines have: 200 Gb/s beside an A100, 400 Gb/s beside the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from oreal_megatron.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    flops: float  # per second
    memory_bytes: float  # per second
    nvlink_bytes: float  # per second and direction
    network_bytes: float  # per second and direction, between nodes
    device: str  # what CUDA calls it


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40, 312e12, 1.555e12, 300e9, 25e9, "NVIDIA A100-SXM4-40GB"),
        Gpu("a100-80g", 80, 312e12, 2.039e12, 300e9, 25e9, "NVIDIA A100-SXM4-80GB"),
        Gpu("h100-80g", 80, 989e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 80GB HBM3"),
        Gpu("h200", 141, 989e12, 4.8e12, 450e9, 50e9, "NVIDIA H200"),
        Gpu("h20", 96, 148e12, 4.0e12, 450e9, 50e9, "NVIDIA H20"),
        Gpu("b200", 180, 2250e12, 7.7e12, 900e9, 50e9, "NVIDIA B200"),
    )
}


def named(name: str) -> Gpu:
    if name not in GPUS:
        raise ConfigError(f"no GPU is called {name}; known are {', '.join(GPUS)}")
    return GPUS[name]


def peak(device: str, dtype: str) -> float | None:
    """Operations per second of the device that CUDA calls so; None where no data sheet above says it."""
    found = [gpu.flops for gpu in GPUS.values() if gpu.device == device]
    return found[0] if found and dtype == "bfloat16" else None

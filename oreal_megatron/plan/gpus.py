"""GPUs by NVIDIA's data sheets (A100, H100, H200, H20, B200 on HGX boards, SXM).

Memory is in GiB, as the sheets' "GB" are: an H200 of "141 GB" shows 140.4 GiB. Operations are bf16 without sparsity.
NVLink counts one direction, half of the number on the sheets. Between nodes there is one network card per GPU, as in
DGX and HGX systems: 200 Gb/s beside an A100, 400 Gb/s beside the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from oreal_megatron.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU."""

    name: str
    memory_gib: float
    flops: float  # per second
    memory_bytes: float  # per second
    nvlink_bytes: float  # per second and direction
    network_bytes: float  # per second and direction, between nodes
    device: str  # name in CUDA


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


def find_gpu(name: str) -> Gpu:
    """Return a GPU by name; raise ConfigError for an unknown one."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name}; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def peak_flops(device: str, dtype: str) -> float | None:
    """Return the peak operations per second of a device by its name in CUDA; None if unknown."""
    peaks = [gpu.flops for gpu in GPUS.values() if gpu.device == device]
    return peaks[0] if peaks and dtype == "bfloat16" else None

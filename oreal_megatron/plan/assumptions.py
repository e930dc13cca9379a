"""What the plan takes for granted because no formula says it. Each is printed with the plan; `--assume KEY=VALUE`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from oreal_megatron.config import ConfigError
from oreal_megatron.config.suggestions import suggest


@dataclass(frozen=True)
class Assumptions:
    """Not measured: nothing of this project has run on several GPUs yet."""

    prompt_tokens: float = 400.0  # mean, with the system prompt
    response_tokens: float = 5000.0  # mean of sampled answers; the longest has sampling.max_new_tokens
    mixed_share: float = 0.6  # of the prompts, which have right and wrong answers and are trained on
    train_mfu: float = 0.40  # of the bf16 peak, in updates and scoring; bubbles and exchanges come on top
    prefill_mfu: float = 0.40
    memory_share: float = 0.60  # of the memory bandwidth, while decoding
    decode_step_ms: float = 4.0  # of every token step, that no bandwidth explains: scheduling, launches
    all_reduce_us: float = 15.0  # of a few rows over the ranks of an engine, twice a layer
    link_share: float = 0.70  # of NVLink and network bandwidth
    pcie_gb_s: float = 25.0  # GB/s of each GPU, for what is offloaded
    gloo_gb_s: float = 1.0  # GB/s of a rank that gathers optimizer states for a checkpoint
    storage_gb_s: float = 5.0  # GB/s of all nodes together, written
    engine_gib: float = 3.0  # of vLLM beside weights and cache: activations, sampler, CUDA graphs
    asleep_gib: float = 1.5  # of these, what stays while it sleeps: CUDA graphs, NCCL, input buffers
    context_gib: float = 0.6  # CUDA context and libraries
    communicator_gib: float = 0.25  # of each process group that is used
    fragments: float = 0.08  # of the trainer's passing memory: held by torch's allocator, used by nobody
    host_gib: float = 1000.0  # memory of a machine
    driver_share: float = 0.015  # of a GPU's memory, never there for programs
    thin: float = 0.05  # a smaller share of the memory left is called thin


def changed(assignments: list[str]) -> Assumptions:
    """The defaults with `KEY=VALUE` assignments."""
    assumed, known = Assumptions(), [field.name for field in dataclasses.fields(Assumptions)]
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key not in known:
            raise ConfigError(f"--assume {assignment}: unknown assumption {key!r}{suggest(key, known)}")
        try:
            assumed = dataclasses.replace(assumed, **{key: float(text)})
        except ValueError:
            raise ConfigError(f"--assume {assignment}: {text!r} is no number") from None
    return assumed

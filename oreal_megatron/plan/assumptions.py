"""Assumptions of the plan that no formula gives. Printed with every plan; change them with `--assume KEY=VALUE`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from oreal_megatron.config import ConfigError
from oreal_megatron.config.suggestions import suggest


@dataclass(frozen=True)
class Assumptions:
    """Assumed values. Not measured: this project has not run on several GPUs yet."""

    prompt_tokens: float = 400.0  # mean, with the system prompt
    response_tokens: float = 5000.0  # mean of sampled responses; the longest has sampling.max_new_tokens
    length_sigma: float = 0.6  # of the logarithm of response lengths, for --rollouts
    length_prompt_share: float = 0.5  # share of its variance that rollouts of one prompt have in common
    mixed_share: float = 0.6  # of the prompts: with correct and incorrect responses, so that they are trained on
    train_mfu: float = 0.40  # of the bf16 peak, in updates and scoring; bubbles and exchanges come on top
    prefill_mfu: float = 0.40
    memory_share: float = 0.60  # of the memory bandwidth, while decoding
    decode_step_ms: float = 4.0  # per decoding step beside memory traffic: scheduling, kernel launches
    all_reduce_us: float = 15.0  # of a few rows over the ranks of an engine, twice per layer
    link_share: float = 0.70  # of NVLink and network bandwidth
    pcie_gb_s: float = 25.0  # GB/s of each GPU, for offloaded models
    host_copy_gb_s: float = 1.5  # GB/s of optimizer states that a rank copies to the host for a checkpoint
    storage_gb_s: float = 5.0  # GB/s of all nodes together, written
    engine_gib: float = 3.0  # of vLLM beside weights and KV cache: activations, sampler, CUDA graphs
    asleep_gib: float = 1.5  # part of it that stays while it sleeps: CUDA graphs, NCCL, input buffers
    context_gib: float = 0.6  # CUDA context and libraries
    communicator_gib: float = 0.25  # per process group in use
    fragments: float = 0.08  # share of the trainer's temporary memory that fragmentation in torch's allocator adds
    host_gib: float = 1000.0  # host RAM of a node
    driver_share: float = 0.015  # of a GPU's memory, not available to programs
    thin: float = 0.05  # margin: a plan with less of the memory left is reported


def with_changes(assignments: list[str]) -> Assumptions:
    """Return the defaults with `KEY=VALUE` assignments."""
    assumed, known = Assumptions(), [field.name for field in dataclasses.fields(Assumptions)]
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key not in known:
            raise ConfigError(f"--assume {assignment}: unknown assumption {key!r}{suggest(key, known)}")
        try:
            assumed = dataclasses.replace(assumed, **{key: float(text)})
        except ValueError:
            raise ConfigError(f"--assume {assignment}: {text!r} is not a number") from None
    return assumed

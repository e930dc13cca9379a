"""Assumptions of the plan that no formula gives. Printed with every plan; change them with `--assume KEY=VALUE`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from oreal_megatron.config import ConfigError, Key, Section, validate
from oreal_megatron.config.schema import config_keys, format_number
from oreal_megatron.config.suggestions import suggest

MOST = 1e9  # no machine and no response is larger
LEAST = 1e-3  # of shares and speeds by which times are divided


@dataclass(frozen=True)
class Assumptions(Section):
    """Assumed values. Not measured: this project has not run on several GPUs yet."""

    prompt_tokens: Annotated[float, Key("mean, with the system prompt", 1, MOST, "tokens")] = 400.0
    response_tokens: Annotated[
        float, Key("mean of sampled responses; the longest has sampling.max_new_tokens", 1, MOST, "tokens")
    ] = 5000.0
    length_sigma: Annotated[float, Key("of the logarithm of response lengths, for --rollouts", 0, 10)] = 0.6
    length_prompt_share: Annotated[
        float, Key("share of its variance that rollouts of one prompt have in common", 0, 1)
    ] = 0.5
    mixed_share: Annotated[
        float, Key("of the prompts: with correct and incorrect responses, so that they are trained on", LEAST, 1)
    ] = 0.6
    train_mfu: Annotated[
        float, Key("of the bf16 peak, in updates and scoring; bubbles and exchanges come on top", LEAST, 1)
    ] = 0.40
    prefill_mfu: Annotated[float, Key("of the bf16 peak, while reading prompts", LEAST, 1)] = 0.40
    memory_share: Annotated[float, Key("of the memory bandwidth, while decoding", LEAST, 1)] = 0.60
    decode_step_ms: Annotated[
        float, Key("per decoding step beside memory traffic: scheduling, kernel launches", 0, MOST, "ms")
    ] = 4.0
    all_reduce_us: Annotated[
        float, Key("of a few rows over the ranks of an engine, twice per layer", 0, MOST, "us")
    ] = 15.0
    link_share: Annotated[float, Key("of NVLink and network bandwidth", LEAST, 1)] = 0.70
    pcie_gb_s: Annotated[float, Key("of each GPU, for offloaded models", LEAST, MOST, "GB/s")] = 25.0
    host_copy_gb_s: Annotated[
        float, Key("optimizer states that a rank copies to the host for a checkpoint", LEAST, MOST, "GB/s")
    ] = 1.5
    storage_gb_s: Annotated[float, Key("of all nodes together, written", LEAST, MOST, "GB/s")] = 5.0
    engine_gib: Annotated[
        float, Key("of vLLM beside weights and KV cache: activations, sampler, CUDA graphs", 0, MOST, "GiB")
    ] = 3.0
    asleep_gib: Annotated[
        float, Key("part of it that stays while it sleeps: CUDA graphs, NCCL, input buffers", 0, MOST, "GiB")
    ] = 1.5
    context_gib: Annotated[float, Key("CUDA context and libraries", 0, MOST, "GiB")] = 0.6
    communicator_gib: Annotated[float, Key("per process group in use", 0, MOST, "GiB")] = 0.25
    fragments: Annotated[
        float, Key("share of the trainer's temporary memory that fragmentation in torch's allocator adds", 0, 100)
    ] = 0.08
    host_gib: Annotated[float, Key("host RAM of a node", 0, MOST, "GiB")] = 1000.0
    driver_share: Annotated[float, Key("of a GPU's memory, not available to programs", 0, 1)] = 0.015
    thin: Annotated[float, Key("margin: a plan with less of the memory left is reported", 0, 1)] = 0.05


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
    validate(assumed, "--assume ")
    return assumed


def describe() -> str:
    """Return every assumption with its default, meaning and bounds, one per line."""
    return "\n".join(
        f"{key.path}={format_number(float(str(key.default)))}  {key.key.meaning} ({key.key.bounds})"
        for key in config_keys(Assumptions())
    )

"""Seconds of each phase of a step, estimated from operations, bytes and assumptions.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from oreal_megatron.models import flops
from oreal_megatron.observe import speed
from oreal_megatron.plan import memory
from oreal_megatron.plan.activations import ITEMSIZE
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.reshard import planner
from oreal_megatron.reshard.overlaps import ReshardLayout


@dataclass(frozen=True)
class Generation:
    """Work of one engine replica in a step."""

    rollouts: float  # per replica
    concurrent: float  # of them at once
    prefill: float  # seconds
    decode: float
    bound: str  # what limits decoding

    @property
    def seconds(self) -> float:
        """Seconds of prefill and decoding."""
        return self.prefill + self.decode


@dataclass(frozen=True)
class Transfer:
    """Bytes of one weight sync: received by the busiest rank, and between nodes over all ranks."""

    received: float
    received_between: float
    all_between: float
    transport: str


def layout(scenario: Scenario) -> ReshardLayout:
    """Return the layouts of trainer and engine for the reshard planner."""
    parallel = scenario.config.parallel
    # Context-parallel ranks hold the same weights as data-parallel ones.
    return ReshardLayout(
        scenario.arch,
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual,
        scenario.config.engine.tensor,
        scenario.world,
        min(scenario.node, scenario.world),
    )


def transfer(scenario: Scenario) -> Transfer:
    """Return the traffic of the direct transport's plan; the gather transport sends every rank what it lacks."""
    parallel, itemsize = scenario.config.parallel, ITEMSIZE[scenario.config.engine_dtype]
    if scenario.config.engine.transport == "direct" and not scenario.arch.experts:
        buffer = scenario.config.engine.buffer_mib * 2**20 // 4
        traffic = planner.plan_transfer(layout(scenario), 0, itemsize, buffer).traffic
        return Transfer(
            traffic.received.max(), traffic.received_between.max(), traffic.received_between.sum(), "direct"
        )
    stages = [
        scenario.elements(stage, "lm") * parallel.tensor * ITEMSIZE[scenario.config.model.dtype]
        for stage in range(parallel.pipeline)
    ]
    least = min(range(parallel.pipeline), key=stages.__getitem__)  # its ranks hold least and receive all other stages
    others = sum(stages) - stages[least]
    between = (
        others if scenario.crosses_nodes(parallel.pipeline, parallel.tensor * parallel.context * scenario.data) else 0
    )
    return Transfer(others + stages[least] * (1 - 1 / parallel.tensor), between, between * scenario.world, "gather")


def generation(scenario: Scenario) -> Generation:
    """Return the time of generation.

    Every decoding step reads the weights once, every token the keys and values before it. One response reaches the
    limit, so that there are at least as many steps as tokens in it.
    """
    config, assumed = scenario.config, scenario.assumed
    rollouts = config.data.prompts_per_step * config.sampling.rollouts_per_prompt / scenario.replicas
    context = assumed.prompt_tokens + assumed.response_tokens / 2
    fitting = config.engine.kv_cache_gib * 2**30 / scenario.cache_token() / context
    concurrent = max(1.0, min(rollouts, config.engine.max_num_seqs, fitting))
    tokens, longest = rollouts * assumed.response_tokens, config.sampling.max_new_tokens
    steps = max(longest, tokens / concurrent)
    bandwidth = scenario.gpu.memory_bytes * assumed.memory_share
    reading = (steps * scenario.engine_weights() + tokens * context * scenario.cache_token()) / bandwidth
    rate = config.engine.tensor * scenario.gpu.flops * assumed.prefill_mfu
    multiplying = tokens * 2 * flops.matrix_elements(scenario.arch) / rate
    prefill = rollouts * assumed.prompt_tokens * 2 * flops.matrix_elements(scenario.arch) / rate
    bound = "the longest response" if steps == longest else f"{concurrent:.0f} concurrent responses"
    decode = max(reading, multiplying) + steps * step_overhead(scenario)
    return Generation(rollouts, concurrent, prefill, decode, bound)


def step_overhead(scenario: Scenario) -> float:
    """Return the seconds of a decoding step beside reads and products."""
    exchanges = (
        2 * scenario.arch.layers * scenario.assumed.all_reduce_us / 1e6 if scenario.config.engine.tensor > 1 else 0.0
    )
    return exchanges + scenario.assumed.decode_step_ms / 1e3


def bubble(scenario: Scenario) -> float:
    """Return the share of the training phases in which pipeline stages wait for each other, as `speed/bubble`."""
    mini_batches = scenario.config.loss.mini_batches
    fills = speed.pipeline_fills(scenario.roles, mini_batches, scenario.config)
    return scenario.config.parallel.bubble(max(scenario.micro_batches, mini_batches), fills)


def training(scenario: Scenario, passes: float, mini_batches: int = 1) -> float:
    """Return the seconds of a number of forward passes (a backward counts as two) over the samples of a step.

    With several mini-batches, each is a pass of its own through the pipeline.
    """
    forward = flops.forward(scenario.arch, [scenario.sequence_tokens], scenario.sequence_tokens)
    computing = (
        scenario.sequences * forward * passes / (scenario.world * scenario.gpu.flops * scenario.assumed.train_mfu)
    )
    waiting = scenario.config.parallel.bubble(max(scenario.micro_batches, mini_batches), mini_batches)
    return (computing + exchanges(scenario) * passes) / (1 - waiting)


def exchanges(scenario: Scenario) -> float:
    """Return the seconds of communication in a forward pass.

    Tensor-parallel ranks reduce residuals twice per layer, context-parallel ranks gather keys and values.
    """
    parallel, arch = scenario.config.parallel, scenario.arch
    values = scenario.sequences * scenario.sequence_tokens / scenario.data * arch.layers / parallel.pipeline
    values *= ITEMSIZE[scenario.config.model.dtype] / scenario.assumed.link_share
    residuals = values / parallel.context * 4 * arch.hidden * (1 - 1 / parallel.tensor)
    keys = values * 2 * arch.kv_groups * arch.head_dim / parallel.tensor * (1 - 1 / parallel.context)
    return residuals / _link(scenario, parallel.tensor, 1) + keys / _link(scenario, parallel.context, parallel.tensor)


def _link(scenario: Scenario, ranks: int, stride: int) -> float:
    """Return the bandwidth between ranks of a group, in bytes per second."""
    return scenario.gpu.network_bytes if scenario.crosses_nodes(ranks, stride) else scenario.gpu.nvlink_bytes


def phases(scenario: Scenario, moved: Transfer) -> dict[str, float]:
    """Return the seconds of each phase of a step that trains the policy, without checkpoints and evaluations."""
    update = training(scenario, update_passes(scenario)) + gradients(scenario)
    seconds = {"generate": generation(scenario).seconds, "parity": parity_check(scenario)}
    if scenario.config.selection.penalties.perplexity:
        seconds["perplexity"] = perplexity(scenario)
    if scenario.config.reward_model.enabled:
        seconds["reward_model"] = update + swap(scenario, "reward_model")
    seconds["reference"] = training(scenario, 1) + swap(scenario, "reference")
    seconds["policy"] = policy_updates(scenario) + swap(scenario, "policy")
    share = scenario.assumed.link_share
    within = (moved.received - moved.received_between) / (scenario.gpu.nvlink_bytes * share)
    seconds["weight_sync"] = max(within, moved.received_between / (scenario.gpu.network_bytes * share)) + swap(
        scenario, ""
    )
    return seconds


def policy_updates(scenario: Scenario) -> float:
    """Return the seconds of a step's updates of the policy, and of its log-probs before them."""
    loss = scenario.config.loss
    scored = bool(loss.reward_kl_coef) + bool(loss.term and loss.mini_batches > 1)  # before the first update
    computing = training(scenario, update_passes(scenario), loss.mini_batches) * loss.passes
    return training(scenario, 1) * scored + computing + gradients(scenario) * loss.updates_per_step


def parity_check(scenario: Scenario) -> float:
    """Return the seconds to score the first tokens of a few rollouts, in proportion to their number."""
    engine, assumed = scenario.config.engine, scenario.assumed
    scored = engine.parity_rollouts * scenario.replicas * (assumed.prompt_tokens + engine.parity_tokens)
    return training(scenario, 1) * scored / (scenario.sequences * scenario.sequence_tokens) + swap(scenario, "")


def update_passes(scenario: Scenario) -> int:
    """Return the forward passes of an update: a backward counts as two, full recomputation as one more."""
    return 4 if scenario.config.megatron.get("recompute_granularity") == "full" else 3


def perplexity(scenario: Scenario) -> float:
    """Return the seconds in which the reference scores all rollouts for the perplexity penalty.

    An upper bound: rollouts that another penalty names, and those without a verdict, are not scored.
    """
    config = scenario.config
    rollouts = config.data.prompts_per_step * config.sampling.rollouts_per_prompt
    return training(scenario, 1) * rollouts / scenario.sequences + swap(scenario, "reference")


def distillation(scenario: Scenario) -> dict[str, float]:
    """Return the seconds of each pass of a step of `oreal distill`; empty without a teacher.

    Sequences have the assumed lengths of prompt and response. The maps of distillation.projection are not counted.
    """
    if scenario.teacher is None:
        return {}
    share = scenario.config.supervised.samples_per_step / scenario.sequences
    teacher = dataclasses.replace(scenario, arch=scenario.teacher, teacher=None)
    seconds = {"teacher": training(teacher, 1) * share + swap(teacher, "")}
    if scenario.config.distillation.objective != "kl_logits":  # the others need statistics of the entire step
        seconds["statistics"] = training(scenario, 1) * share + swap(scenario, "")
    update = training(scenario, update_passes(scenario)) * share + gradients(scenario)
    return seconds | {"policy": update + swap(scenario, "policy")}


def gradients(scenario: Scenario) -> float:
    """Return the seconds to reduce fp32 gradients and gather new weights over the ranks that share an optimizer."""
    parallel = scenario.config.parallel
    sharing = scenario.data * parallel.context
    if sharing == 1:
        return 0.0
    moved = scenario.elements(0, "lm") * (4 + ITEMSIZE[scenario.config.model.dtype]) * (1 - 1 / sharing)
    return moved / (_link(scenario, sharing, parallel.tensor) * scenario.assumed.link_share)


def swap(scenario: Scenario, model: str) -> float:
    """Return the seconds to load a model and, if it is updated, to offload it; model "": the policy, to be read."""
    if not scenario.config.offload:
        return 0.0
    part = memory.model_bytes(scenario, 0, scenario.roles.get(model, "lm"))
    if model in ("policy", "reward_model"):
        moved: float = 2 * (part["parameters"] + part["optimizer"])
    elif model == "reference" and scenario.config.reference.moves:  # with the policy's weights, which are only read
        moved = 2 * memory.reference_bytes(scenario, 0) + part["parameters"]
    else:  # only read: the copy on the host stays valid
        moved = part["parameters"]
    return moved / (scenario.assumed.pcie_gb_s * 1e9)


def checkpoint(scenario: Scenario) -> tuple[float, float]:
    """Return bytes of a checkpoint of all models that change, and seconds to gather and write it."""
    states = 12  # main weights and moments; in fp32 the weights are written twice
    per_element = ITEMSIZE[scenario.config.model.dtype] + states
    trained = [head for name, head in scenario.roles.items() if name != "reference"]
    written: float = sum(scenario.all_elements(head) for head in trained) * per_element
    if scenario.config.reference.moves:  # without optimizer
        written += scenario.all_elements("lm") * (4 if scenario.config.wide_reference else per_element - states)
    gathered = sum(scenario.elements(0, head) for head in trained) * states
    return written, gathered / (scenario.assumed.host_copy_gb_s * 1e9) + written / (scenario.assumed.storage_gb_s * 1e9)

"""Seconds of each phase of a step, estimated from operations, bytes and what assumptions.py takes for granted."""

from __future__ import annotations

from dataclasses import dataclass

from oreal_megatron.models import flops
from oreal_megatron.plan import memory
from oreal_megatron.plan.activations import ITEMSIZE
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.reshard import planner
from oreal_megatron.reshard.overlaps import ReshardLayout


@dataclass(frozen=True)
class Generation:
    """What a replica of the engine does in a step."""

    answers: float  # of each replica
    concurrent: float  # of them at once
    prefill: float  # seconds
    decode: float
    bound: str  # what decides the time of decoding

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Transfer:
    """Bytes of one hand-over of the weights: those of the busiest rank, and over all ranks between nodes."""

    received: float
    received_between: float
    all_between: float
    transport: str


def layout(case: Scenario) -> ReshardLayout:
    cut = case.config.parallel
    # Context-parallel ranks hold the same weights as data-parallel ones.
    return ReshardLayout(
        case.arch,
        cut.tensor,
        cut.pipeline,
        cut.virtual,
        case.config.engine.tensor,
        case.world,
        min(case.node, case.world),
    )


def transfer(case: Scenario) -> Transfer:
    """From the plan of the direct transport; the other one gathers on every rank what it does not hold."""
    cut, itemsize = case.config.parallel, ITEMSIZE[case.config.engine_dtype]
    if case.config.engine.transport == "direct" and not case.arch.experts:
        buffer = case.config.engine.buffer_mib * 2**20 // 4
        traffic = planner.plan_transfer(layout(case), 0, itemsize, buffer).traffic
        return Transfer(
            traffic.received.max(), traffic.received_between.max(), traffic.received_between.sum(), "direct"
        )
    stages = [
        case.elements(stage, "lm") * cut.tensor * ITEMSIZE[case.config.model.dtype] for stage in range(cut.pipeline)
    ]
    least = min(range(cut.pipeline), key=stages.__getitem__)  # whose ranks hold least, and receive all the rest
    others = sum(stages) - stages[least]
    between = others if case.crosses_nodes(cut.pipeline, cut.tensor * cut.context * case.data) else 0
    return Transfer(others + stages[least] * (1 - 1 / cut.tensor), between, between * case.world, "gather")


def generation(case: Scenario) -> Generation:
    """Every token step reads the weights once, every token the keys and values before it; some answer is as long as
    may be, so there are at least as many steps."""
    config, assumed = case.config, case.assumed
    answers = config.data.prompts_per_step * config.sampling.rollouts_per_prompt / case.replicas
    context = assumed.prompt_tokens + assumed.response_tokens / 2
    fitting = config.engine.kv_cache_gib * 2**30 / case.cache_token() / context
    concurrent = max(1.0, min(answers, config.engine.max_num_seqs, fitting))
    tokens, longest = answers * assumed.response_tokens, config.sampling.max_new_tokens
    steps = max(longest, tokens / concurrent)
    bandwidth = case.gpu.memory_bytes * assumed.memory_share
    reading = (steps * case.engine_weights() + tokens * context * case.cache_token()) / bandwidth
    rate = config.engine.tensor * case.gpu.flops * assumed.prefill_mfu
    multiplying = tokens * 2 * flops.matrix_elements(case.arch) / rate
    prefill = answers * assumed.prompt_tokens * 2 * flops.matrix_elements(case.arch) / rate
    bound = "the longest answer" if steps == longest else f"{concurrent:.0f} answers at once"
    return Generation(answers, concurrent, prefill, max(reading, multiplying) + steps * between_steps(case), bound)


def between_steps(case: Scenario) -> float:
    """Seconds of every token step that neither reads nor multiplies."""
    exchanges = 2 * case.arch.layers * case.assumed.all_reduce_us / 1e6 if case.config.engine.tensor > 1 else 0.0
    return exchanges + case.assumed.decode_step_ms / 1e3


def bubble(case: Scenario) -> float:
    """Share of an update in which a pipeline's stages wait for each other."""
    return case.config.parallel.bubble(case.micro_batches)


def training(case: Scenario, passes: float) -> float:
    """Seconds of so many passes forward (a backward is two) over what a step trains on."""
    forward = flops.forward(case.arch, [case.sequence_tokens], case.sequence_tokens)
    computing = case.sequences * forward * passes / (case.world * case.gpu.flops * case.assumed.train_mfu)
    return (computing + exchanges(case) * passes) / (1 - bubble(case))


def exchanges(case: Scenario) -> float:
    """Seconds of a pass forward in which a layer's ranks wait for each other: tensor-parallel ones put residuals
    together twice, context-parallel ones gather keys and values."""
    cut, arch = case.config.parallel, case.arch
    values = case.sequences * case.sequence_tokens / case.data * arch.layers / cut.pipeline
    values *= ITEMSIZE[case.config.model.dtype] / case.assumed.link_share
    residuals = values / cut.context * 4 * arch.hidden * (1 - 1 / cut.tensor)
    keys = values * 2 * arch.kv_groups * arch.head_dim / cut.tensor * (1 - 1 / cut.context)
    return residuals / _link(case, cut.tensor, 1) + keys / _link(case, cut.context, cut.tensor)


def _link(case: Scenario, ranks: int, stride: int) -> float:
    """Bytes per second between ranks of a group."""
    return case.gpu.network_bytes if case.crosses_nodes(ranks, stride) else case.gpu.nvlink_bytes


def phases(case: Scenario, moved: Transfer) -> dict[str, float]:
    """Seconds of each phase of a step in which the policy learns; checkpoints and evaluations are not in it."""
    again = 1 if case.config.megatron.get("recompute_granularity") == "full" else 0
    update = training(case, 3 + again) + gradients(case)
    seconds = {"generate": generation(case).seconds, "parity": proving(case)}
    if case.config.reward_model.enabled:
        seconds["reward_model"] = update + swap(case, "reward_model")
    seconds["reference"] = training(case, 1) + swap(case, "reference")
    seconds["policy"] = update + swap(case, "policy")
    share = case.assumed.link_share
    within = (moved.received - moved.received_between) / (case.gpu.nvlink_bytes * share)
    seconds["weight_sync"] = max(within, moved.received_between / (case.gpu.network_bytes * share)) + swap(case, "")
    return seconds


def proving(case: Scenario) -> float:
    """Seconds to score the first tokens of a few answers with the policy; its share of a pass is that of its tokens."""
    engine, assumed = case.config.engine, case.assumed
    scored = engine.parity_rollouts * case.replicas * (assumed.prompt_tokens + engine.parity_tokens)
    return training(case, 1) * scored / (case.sequences * case.sequence_tokens) + swap(case, "")


def gradients(case: Scenario) -> float:
    """Seconds to sum fp32 gradients and to gather the new weights over the ranks that share an optimizer."""
    cut = case.config.parallel
    sharing = case.data * cut.context
    if sharing == 1:
        return 0.0
    moved = case.elements(0, "lm") * (4 + ITEMSIZE[case.config.model.dtype]) * (1 - 1 / sharing)
    return moved / (_link(case, sharing, cut.tensor) * case.assumed.link_share)


def swap(case: Scenario, model: str) -> float:
    """Seconds to fetch an idle model and to put it away again; for the transfer, the policy's weights."""
    if not case.config.offload:
        return 0.0
    part = memory.held(case, 0, case.roles.get(model, "lm"))
    moved = part["parameters"] + (part["optimizer"] if model in ("policy", "reward_model") else 0)
    return 2 * moved / (case.assumed.pcie_gb_s * 1e9)


def checkpoint(case: Scenario) -> tuple[float, float]:
    """Bytes of a checkpoint with every trained model, and seconds to gather and write it."""
    states = 12  # main weights and moments; in fp32 the weights are written twice
    per_element = ITEMSIZE[case.config.model.dtype] + states
    trained = [head for name, head in case.roles.items() if name != "reference"]
    written = sum(case.all_elements(head) for head in trained) * per_element
    gathered = sum(case.elements(0, head) for head in trained) * states
    return written, gathered / (case.assumed.gloo_gb_s * 1e9) + written / (case.assumed.storage_gb_s * 1e9)

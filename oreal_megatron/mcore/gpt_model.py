"""Megatron's GPTModel for one pipeline stage, filled from Hugging Face tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.mcore import expert_layers, layers, megatron_fields, megatron_patches
from oreal_megatron.mcore.layer_spec import layer_spec
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.output_heads import PassThroughOutput, ScalarHead
from oreal_megatron.models import tensors, torch_dist_keys
from oreal_megatron.models.architecture import Architecture

# Fused operations that need apex or Transformer Engine; a recipe may enable them through config.megatron.
NEED_APEX_OR_TE = dict.fromkeys(("masked_softmax_fusion", "persist_layer_norm"), False)
BESIDE = f"{torch_dist_keys.FEATURE_PROJECTION}."  # prefix of parameters that are no part of the model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    """Return the device of the models: the GPU, else the CPU; the meta device in a rehearsal, as torch's default."""
    default = torch.get_default_device()
    if default.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return default


def _virtual_stages(config: Config) -> int | None:
    """Return Megatron's number of chunks per stage; 1 would select the interleaved schedule, so None stands for it."""
    return config.parallel.virtual if config.parallel.virtual > 1 else None


def transformer_config(arch: Architecture, config: Config) -> TransformerConfig:
    """Return Megatron's description of the model and its layout; `config.megatron` adds further fields.

    Raises ConfigError for an unknown field, one that is derived from the model or the layout, a value of another type,
    or a combination that Megatron refuses.
    """
    dtype = DTYPES[config.model.dtype]
    fixed = dict(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual_stages(config),
        context_parallel_size=config.parallel.context,
        sequence_parallel=config.parallel.sequence,
        variable_seq_lengths=True,  # micro-batches differ in shape, so pipeline stages send it
        # Interleaved, two stages are each other's next and previous; batched, their messages would be mixed up.
        overlap_p2p_comm=config.parallel.virtual > 1,
        batch_p2p_comm=config.parallel.virtual == 1,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, even for dense models
        calculate_per_token_loss=True,  # our losses are divided by counts of the step; Megatron must not average again
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        gradient_accumulation_fusion=True,  # apex's, or megatron_patches.Fp32WeightGradient
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every tensor is filled from the Hugging Face folder
        **expert_layers.transformer_fields(arch),
    )
    expert_layers.refuse_expert_parallelism(config.megatron)
    megatron_fields.check_fields(config.megatron, derived=fixed)
    if config.model.layers == "local":
        megatron_patches.use_own_rotary(layers.fused_rotary)
    if config.megatron.get("deterministic_mode"):
        _require_deterministic_libraries()
    try:
        with cpu_shim():
            return TransformerConfig(**fixed, **{**_fusions(arch), **config.megatron})
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error


def _fusions(arch: Architecture) -> dict[str, bool]:
    """Return which operations are fused by default: on GPUs SwiGLU, compiled by torch.

    On CPUs it would need a C++ compiler, and results would change in their last digits. The fused rotary embedding
    waits for a GPU to run it: a recipe sets `megatron={"apply_rope_fusion": True}`.
    """
    return NEED_APEX_OR_TE | {"bias_activation_fusion": torch.cuda.is_available() and not arch.experts}


def _require_deterministic_libraries() -> None:
    """Set the environment variables that deterministic mode needs; raise ConfigError on a conflict."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS's products
    if os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        raise ConfigError(
            "deterministic_mode is set, and so is NVTE_ALLOW_NONDETERMINISTIC_ALGO="
            f"{os.environ['NVTE_ALLOW_NONDETERMINISTIC_ALGO']}; Megatron refuses both together, so unset the latter"
        )


def build(arch: Architecture, config: Config, head: str) -> list[GPTModel]:
    """Build this rank's pipeline stage, uninitialised, with a language-model ("lm") or "scalar" head.

    Returns its interleaved chunks of layers: `config.parallel.virtual` of them, usually one.
    """
    with cpu_shim():
        megatron = transformer_config(arch, config)
        if megatron.deterministic_mode:
            torch.use_deterministic_algorithms(True)
        megatron_patches.prepare_experts()
        chunks = [_chunk(arch, config, megatron, head, chunk) for chunk in range(config.parallel.virtual)]
        return [chunk.to(device(), megatron.params_dtype) for chunk in chunks]


def _chunk(arch: Architecture, config: Config, megatron: TransformerConfig, head: str, chunk: int) -> GPTModel:
    stages, stage = _stages_and_stage(config, chunk)
    spec = layer_spec(arch, config)
    model = GPTModel(
        megatron,
        TransformerBlockSubmodules([spec] * len(arch.stage_layers(stages, stage)), layer_norm=layers.RMSNorm),
        vocab_size=arch.padded_vocab(config.parallel.tensor),
        max_sequence_length=arch.max_positions,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=arch.tied and head == "lm",
        vp_stage=chunk if config.parallel.virtual > 1 else None,
    )
    fused_rotary = megatron.apply_rope_fusion and config.model.layers == "local"
    model.rotary_pos_emb = layers.PackedRotary(arch.rope.frequencies(arch.head_dim).to(device()), fused_rotary)
    if head == "scalar" and stage == stages - 1:
        model.output_layer = ScalarHead(arch.hidden, megatron.params_dtype, megatron.sequence_parallel)
    elif stage == stages - 1:
        model.output_layer.__class__ = PassThroughOutput  # keeps its parameters, their sharding and their names
    return model


def _stages_and_stage(config: Config, chunk: int) -> tuple[int, int]:
    """Return the number of stages, interleaved chunks counted as stages, and the stage of a chunk of this rank."""
    pipeline = config.parallel.pipeline
    stage = chunk * pipeline + parallel_state.get_pipeline_model_parallel_rank()
    return pipeline * config.parallel.virtual, stage


def named_shards(
    chunks: list[GPTModel], arch: Architecture, config: Config, head: str
) -> Iterator[tuple[tensors.Entry, Tensor]]:
    """Yield the mapping entries of this rank's stage, each with the live parameter it describes.

    Without the projection of distillation, which is trained beside the model.
    """
    for number, chunk in enumerate(chunks):
        stages, stage = _stages_and_stage(config, number)
        live, offset = dict(chunk.named_parameters()), arch.stage_layers(stages, stage).start
        live = {name: value for name, value in live.items() if not name.startswith(BESIDE)}
        for entry in tensors.entries(arch, config.parallel.tensor, stages, stage, head):
            yield entry, live.pop(_live_name(entry.megatron, offset, live))
        if live:
            raise RuntimeError(f"Megatron's model has tensors that no mapping entry describes: {', '.join(live)}")


def load(chunks: list[GPTModel], arch: Architecture, config: Config, head: str, read: Callable[[str], Tensor]) -> None:
    """Fill the model with Hugging Face tensors, which `read` returns by name."""
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), config.parallel.tensor
    with torch.no_grad():
        for entry, parameter in named_shards(chunks, arch, config, head):
            part = tensors.shard(entry, tensors.to_megatron(entry, arch, read), rank, ranks)
            if part.shape != parameter.shape:
                raise ConfigError(
                    f"{entry.megatron}: the file gives {tuple(part.shape)} for this rank, the model has "
                    f"{tuple(parameter.shape)}; does config.json belong to these weights?"
                )
            parameter.copy_(part)
            if not parameter.is_meta and not parameter.isfinite().all():  # meta: in a rehearsal, without values
                raise ConfigError(_describe_non_finite(entry, read))
            # Megatron marks shards while it initialises them, which is skipped here. Without the mark, a shard counts
            # as a copy of the first rank's and is missing from the gradient norm: clipping would depend on the layout.
            parameter.tensor_model_parallel = entry.sharding is not tensors.Sharding.REPLICATED  # type: ignore[attr-defined]


def _describe_non_finite(entry: tensors.Entry, read: Callable[[str], Tensor]) -> str:
    """Return a message about the first tensor of an entry that holds NaN or infinity."""
    name = next((name for name in entry.hf if not read(name).isfinite().all()), entry.megatron)
    return (
        f"the model's tensor {name} holds values that are not finite: the file is damaged, or was saved by a run that "
        "had diverged; use an earlier model"
    )


def _live_name(name: str, offset: int, live: Collection[str]) -> str:
    """Return an entry's name on the stage, which counts its own layers; Transformer Engine's contain the norm."""
    parts = name.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return name
    layer = f"decoder.layers.{int(parts[2]) - offset}."
    return layer + (parts[3] if layer + parts[3] in live else torch_dist_keys.FUSED.get(parts[3], parts[3]))


def unwrap(model: Any) -> GPTModel:
    """Return the GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module
    return model

"""Patches of Megatron-core 0.16.1: every place where this project changes the library.

| patch | reason | upstream | can go when |
|---|---|---|---|
| `CPU_PATCHES`, by `cpu_shim` | CUDA is named where a CPU tensor would do | [1] | test_cpu_layer.py names the row |
| `use_torch_adam` | with Transformer Engine or apex, FusedAdam is silently used | none | the caller can choose AdamW |
| `loadable_torch_adam` | AdamW's `step` is expected in the checkpoint | [2] | loading skips `step` |
| `use_own_gathering` | saving copies each optimizer state six times on the host | none | one copy does |
| `use_own_weight_gradient` | fp32 gradient buffers need apex's extension | none | there is a fallback without apex |
| `use_own_rotary` | fused rotary embedding needs Transformer Engine | none | the caller can pass a function |
| `prepare_experts` | experts need a symbol of Transformer Engine, and CUDA streams | [1] | they run without both |
| `use_local_results_queue` | a save starts a process only to hold a queue | none | the queue can be passed in |

[1] https://github.com/NVIDIA/Megatron-LM/pull/6270 removes such assumptions from model conversion.
[2] https://github.com/NVIDIA/Megatron-LM/pull/5742 makes the expected optimizer states explicit.
"none": no issue is known. runtime/versions.py refuses releases for which the patches were not written. While a rank is
simulated, fake_world.py replaces further functions for the duration of a `with` block.

The CPU patches are active only inside `cpu_shim()`, around calls into Megatron, because transformers and vLLM probe
torch.cuda. On a machine with a GPU `cpu_shim()` does nothing. A TorchFunctionMode would see every call of torch;
these stand-ins replace only the functions that Megatron calls.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import megatron.core.optimizer
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers as linear_layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from oreal_kernels import gemm
from torch import Tensor

from oreal_megatron.mcore import optimizer_state


class Patch(NamedTuple):
    """An attribute of a module or class, and its replacement."""

    owner: Any
    attribute: str
    replacement: Any


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the tensor factory with `device="cuda"` replaced by the CPU."""

    def create(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


_TENSOR_TYPE = torch.Tensor.type


def _cuda_type_name(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the name that a CUDA tensor's type would have; DistributedOptimizer compares it."""
    result = _TENSOR_TYPE(tensor, *args, **kwargs)
    return f"torch.cuda.{result.rpartition('.')[2]}" if isinstance(result, str) else result


def _do_nothing(*args: Any, **kwargs: Any) -> None: ...


CPU_PATCHES: dict[str, Patch] = {
    "current_device": Patch(torch.cuda, "current_device", lambda: "cpu"),
    "synchronize": Patch(torch.cuda, "synchronize", _do_nothing),
    "get_rng_state": Patch(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "manual_seed": Patch(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    "tensor": Patch(torch, "tensor", _on_cpu(torch.tensor)),
    "zeros": Patch(torch, "zeros", _on_cpu(torch.zeros)),
    "Tensor.type": Patch(torch.Tensor, "type", _cuda_type_name),
    "Tensor.cuda": Patch(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
    "_get_cuda_rng_state": Patch(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "_set_cuda_rng_state": Patch(
        megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    ),
}

_active = False


@contextlib.contextmanager
def cpu_shim(without: str | None = None) -> Iterator[None]:
    """Let Megatron run on a machine without a GPU. `without` leaves one patch out, to test that it is needed."""
    if _active or torch.cuda.is_available():
        yield
        return
    with replaced({name: patch for name, patch in CPU_PATCHES.items() if name != without}):
        yield


@contextlib.contextmanager
def replaced(patches: Mapping[str, Patch]) -> Iterator[None]:
    """Apply patches for the duration of the block, in which `cpu_shim` adds nothing."""
    global _active
    originals = [(patch.owner, patch.attribute, getattr(patch.owner, patch.attribute)) for patch in patches.values()]
    _active = True
    try:
        for owner, attribute, replacement in patches.values():
            setattr(owner, attribute, replacement)
        yield
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)
        _active = False


def use_torch_adam() -> None:
    """Make Megatron create torch's AdamW; call it before an optimizer is created."""
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False


@contextlib.contextmanager
def loadable_torch_adam() -> Iterator[None]:
    """Copy only the optimizer tensors that a checkpoint contains, while it is loaded."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def copy_present(self: DistributedOptimizer, model_parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, target in {"param": main, **self.optimizer.state[main]}.items():
            if name in tensors and name != "step":
                target.copy_(tensors[name])

    DistributedOptimizer._set_main_param_and_optimizer_states = copy_present
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original


def use_own_gathering() -> None:
    """Let optimizer states be gathered by optimizer_state.py when they are saved; Megatron still loads them."""
    DistributedOptimizer.sharded_param_state_fully_reshardable = _gather_or_load


_MEGATRON_STATES = DistributedOptimizer.sharded_param_state_fully_reshardable


def _gather_or_load(
    self: DistributedOptimizer, weights: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> Any:
    if is_loading:
        return _MEGATRON_STATES(self, weights, is_loading, metadata)
    return optimizer_state.sharded(self, weights)


class Fp32WeightGradient:
    """Replacement for apex's extension: gradients of linear layers are added to fp32 buffers by one product.

    The product has an fp32 result: nothing is rounded to bf16 in between, and no gradient exists beside the buffer.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(rows: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        """Add gradient^T rows to main_grad. Shapes: main_grad [out, in], gradient [n, out], rows [n, in]."""
        gemm.add_weight_gradient(gradient, rows, main_grad)


def use_own_weight_gradient() -> None:
    """Let linear layers add their weight gradients through `Fp32WeightGradient` where apex is not installed."""
    if not linear_layers._grad_accum_fusion_available:
        linear_layers.fused_weight_gradient_mlp_cuda = Fp32WeightGradient
        linear_layers._grad_accum_fusion_available = True


def use_own_rotary(rotate: Callable[..., Tensor]) -> None:
    """Let `apply_rope_fusion` call this function; call it before a TransformerConfig is made."""
    rope_utils.fused_apply_rotary_pos_emb = rotate


def prepare_experts() -> None:
    """Let experts run without Transformer Engine and, on CPUs, without CUDA streams."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # the router reads it even where it could not be imported
    if not torch.cuda.is_available():
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
        MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _already_on_host


def _already_on_host(dispatcher: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """Return the counts as they are: on CPUs nothing has to be copied from a device."""
    return tokens_per_expert


def use_local_results_queue() -> None:
    """Give an asynchronous save a queue of this process, so that Megatron starts no process to hold one."""
    filesystem_async._results_queue = queue.Queue()

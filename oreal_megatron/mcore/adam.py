"""State of torch's AdamW inside Megatron's distributed optimizer.

On GPUs one fused kernel updates weights and moments, without a tensor for intermediate results, and its `step` tensors
are on the device. On CPUs results keep the digits of torch's default.

Loading a checkpoint does two things that a resumed run must undo: all parameters then share one `step` tensor, which
would advance once per parameter and spoil the bias correction (`separate_steps`); and the groups have the settings of
the run that saved them (`apply_settings`).
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

FUSED_DEVICES = ("cuda",)  # on CPUs torch's fused kernel would change the last digits of results


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers inside Megatron's."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def state_tensors(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Return this rank's main weights and their moments."""
    inner = torch_optimizers(optimizer)
    weights = [weight.data for part in inner for group in part.param_groups for weight in group["params"]]
    states = [value for part in inner for state in part.state.values() for value in state.values()]
    return weights + [value for value in states if isinstance(value, Tensor) and value.ndim]


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Choose the kernel, and fill in the zeros that AdamW's first step would create.

    Megatron's `state_dict()` asserts that the state exists, when saving before the first update and when loading.
    """
    _choose_kernel(optimizer)
    for part in torch_optimizers(optimizer):
        for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
            if not part.state[parameter]:
                part.state[parameter] = {
                    "step": torch.tensor(0.0, device=_step_device(parameter)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` tensor of its own again, after loading, on the device that its kernel needs."""
    for part in torch_optimizers(optimizer):
        for parameter, state in part.state.items():
            state["step"] = state["step"].clone().to(_step_device(parameter))


def apply_settings(optimizer: MegatronOptimizer, config: MegatronOptimizerConfig) -> None:
    """Give all groups the kernel, weight decay, betas and epsilon of this run; each step sets the learning rate."""
    _choose_kernel(optimizer)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps


def _choose_kernel(optimizer: MegatronOptimizer) -> None:
    """Use the fused kernel where all parameters are on a GPU, and torch's default elsewhere."""
    for part in torch_optimizers(optimizer):
        for group in part.param_groups:
            fused = bool(group["params"]) and all(_is_fused(parameter) for parameter in group["params"])
            group["fused"], group["foreach"] = (True, False) if fused else (None, None)


def _is_fused(parameter: Tensor) -> bool:
    return parameter.device.type in FUSED_DEVICES


def _step_device(parameter: Tensor) -> torch.device:
    return parameter.device if _is_fused(parameter) else torch.device("cpu")

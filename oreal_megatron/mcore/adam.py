"""State of torch's AdamW inside Megatron's distributed optimizer.

Loading a checkpoint does two things that a resumed run must undo: all parameters then share one `step` tensor, which
would advance once per parameter and spoil the bias correction (`separate_steps`); and the groups have the settings of
the run that saved them (`apply_settings`).
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor


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
    """Fill in the zeros that AdamW's first step would create.

    Megatron's `state_dict()` asserts that the state exists, when saving before the first update and when loading.
    """
    for part in torch_optimizers(optimizer):
        for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
            if not part.state[parameter]:
                part.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` tensor of its own again, after loading."""
    for part in torch_optimizers(optimizer):
        for state in part.state.values():
            state["step"] = state["step"].clone()


def apply_settings(optimizer: MegatronOptimizer, config: MegatronOptimizerConfig) -> None:
    """Give all groups the weight decay, betas and epsilon of the configuration; each step sets the learning rate."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps

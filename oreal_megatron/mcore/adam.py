"""torch's AdamW under megatron-core 0.16.1's DistributedOptimizer, and three repairs for loading it. Without the third,
a resumed run trains with the wrong bias correction and nothing complains: all parameters share one `step` tensor, which
then advances once per parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def use_torch() -> None:
    """Call it before an optimizer is made. Where Transformer Engine or apex can be imported Megatron takes their
    FusedAdam instead, without a word: another optimizer and another checkpoint, of which nothing is proved here."""
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def tensors(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Main weights and their moments, of this rank."""
    main = [weight for inner in _inner(optimizer) for group in inner.param_groups for weight in group["params"]]
    states = [value for inner in _inner(optimizer) for state in inner.state.values() for value in state.values()]
    return [weight.data for weight in main] + [value for value in states if isinstance(value, Tensor) and value.ndim]


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """A fresh AdamW has no state, and state_dict() asserts that it has, when saving before the first update and when
    loading: fill in the zeros that its first step would."""
    for inner in _inner(optimizer):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def loadable() -> Iterator[None]:
    """While loading, copy only the tensors that the checkpoint holds; Megatron asks it for `step` as well."""
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


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` tensor of its own again."""
    for inner in _inner(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()

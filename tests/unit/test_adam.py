"""torch's AdamW inside Megatron's optimizer: which kernel it uses, and its state after creation and after loading.

The fused kernel is that of GPUs; torch has one for CPUs too, on which its handling of state is tested.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from oreal_megatron.mcore import adam

SETTINGS = SimpleNamespace(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)


class FakeMegatronOptimizer:
    """Two chained optimizers, as Megatron has with experts."""

    def __init__(self):
        torch.manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(size)) for size in (3, 5, 7)]
        options = dict(
            lr=0.1, betas=(SETTINGS.adam_beta1, SETTINGS.adam_beta2), eps=SETTINGS.adam_eps, weight_decay=0.1
        )
        self.chained_optimizers = [
            SimpleNamespace(optimizer=torch.optim.AdamW(weights, **options))
            for weights in (self.weights[:2], self.weights[2:])
        ]

    @property
    def param_groups(self):
        return [group for part in self.chained_optimizers for group in part.optimizer.param_groups]

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for part in self.chained_optimizers:
            part.optimizer.step()

    def load_as_megatron_does(self, states: list[dict]) -> None:
        """One `step` tensor for all parameters, on the CPU."""
        for part, state in zip(self.chained_optimizers, states, strict=True):
            step = torch.tensor(state["state"][0]["step"].item())
            for values in state["state"].values():
                values["step"] = step
            part.optimizer.load_state_dict(state)

    def state(self) -> list[dict]:
        return [copy.deepcopy(part.optimizer.state_dict()) for part in self.chained_optimizers]


def steps_of(optimizer: FakeMegatronOptimizer) -> set[float]:
    return {state["step"].item() for part in adam.torch_optimizers(optimizer) for state in part.state.values()}


@pytest.fixture(params=[True, False], ids=["fused", "default"])
def fused(request, monkeypatch) -> bool:
    monkeypatch.setattr(adam, "FUSED_DEVICES", ("cuda", "cpu") if request.param else ("cuda",))
    return request.param


def test_the_kernel_is_chosen_by_device(fused):
    optimizer = FakeMegatronOptimizer()
    adam.allocate_state(optimizer)
    assert {group["fused"] for group in optimizer.param_groups} == {True if fused else None}
    assert {group["foreach"] for group in optimizer.param_groups} == {False if fused else None}


def test_allocated_state_is_that_of_the_first_step(fused):
    ours, torchs = FakeMegatronOptimizer(), FakeMegatronOptimizer()
    adam.allocate_state(ours)
    for number in range(3):
        ours.step(number)
        torchs.step(number)
    for weight, expected in zip(ours.weights, torchs.weights, strict=True):
        if fused:
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weight, expected), "digit for digit"


@pytest.mark.parametrize("saved_fused", [True, False])
def test_a_resumed_run_uses_this_devices_kernel_and_counts_each_step_once(fused, saved_fused, monkeypatch):
    """A checkpoint of a GPU may be loaded on a CPU and the other way round."""
    here = adam.FUSED_DEVICES
    monkeypatch.setattr(adam, "FUSED_DEVICES", ("cuda", "cpu") if saved_fused else ("cuda",))
    before = FakeMegatronOptimizer()
    adam.allocate_state(before)
    before.step(0)
    before.step(1)
    monkeypatch.setattr(adam, "FUSED_DEVICES", here)
    after = FakeMegatronOptimizer()
    adam.allocate_state(after)
    after.load_as_megatron_does(before.state())
    for weight, saved in zip(after.weights, before.weights, strict=True):
        weight.data.copy_(saved.data)
    adam.separate_steps(after)
    adam.apply_settings(after, SETTINGS)
    assert {group["fused"] for group in after.param_groups} == {True if fused else None}
    after.step(2)
    before.step(2)
    assert steps_of(after) == {3.0}
    for weight, expected in zip(after.weights, before.weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


def test_steps_are_on_the_device_that_the_kernel_needs(monkeypatch):
    """torch's fused kernel refuses a `step` on the host; its default wants it there, which saves kernel launches."""
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW([weight]))
    for fused, device in (((), "cpu"), (("meta",), "meta")):
        monkeypatch.setattr(adam, "FUSED_DEVICES", fused)
        optimizer.optimizer.state.clear()
        adam.allocate_state(optimizer)
        assert optimizer.optimizer.state[weight]["step"].device.type == device

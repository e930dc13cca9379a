"""The batch-invariant mode: the platforms that have it, and an environment that vLLM and NCCL read in time."""

from __future__ import annotations

import os

import pytest
import torch

from oreal_megatron import config as c
from oreal_megatron.mcore import parallel
from oreal_megatron.rollout import batch_invariance
from oreal_megatron.runtime import watchdog
from oreal_megatron.session.session import Session


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restore the variables that a test sets."""
    names = [batch_invariance.SWITCH, *batch_invariance.NCCL_SETTINGS]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    yield
    for name in names:
        os.environ.pop(name, None)


def gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.mark.parametrize(
    ("capability", "message"),
    [(None, "there is none"), ((8, 0), "a GPU has compute capability 8.0"), ((8, 9), "8.9; expected 9.0")],
)
def test_a_platform_without_the_mode_is_refused(monkeypatch, capability, message):
    gpu(monkeypatch, capability)
    with pytest.raises(c.ConfigError, match=f"{message}.*set engine.batch_invariant=false"):
        batch_invariance.prepare(c.EngineConfig(batch_invariant=True))
    assert batch_invariance.SWITCH not in os.environ


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("tensor", [1, 4])
def test_newer_gpus_have_it_and_replicas_of_several_ranks_sum_in_one_order(monkeypatch, capability, tensor):
    gpu(monkeypatch, capability)
    batch_invariance.prepare(c.EngineConfig(batch_invariant=True, tensor=tensor))
    assert os.environ[batch_invariance.SWITCH] == "1"
    assert all((name in os.environ) is (tensor > 1) for name in batch_invariance.NCCL_SETTINGS)


def test_a_mode_that_only_the_environment_switches_on_is_refused(monkeypatch):
    monkeypatch.setenv(batch_invariance.SWITCH, "1")
    with pytest.raises(c.ConfigError, match="set engine.batch_invariant=true"):
        batch_invariance.prepare(c.EngineConfig())
    monkeypatch.setenv(batch_invariance.SWITCH, "0")
    batch_invariance.prepare(c.EngineConfig())


def test_a_session_prepares_before_nccl_starts_and_before_vllm_is_imported(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(batch_invariance, "prepare", lambda engine: calls.append("prepare"))
    monkeypatch.setattr(parallel, "start_process_group", lambda timeout_s: calls.append("NCCL"))
    monkeypatch.setattr(watchdog, "start", lambda config: calls.append("watchdog"))
    Session(c.Config()).__enter__()
    assert calls == ["prepare", "NCCL", "watchdog"]


def test_the_installed_vllm_knows_the_switch_and_sets_nccl_alike(monkeypatch):
    import vllm.envs
    from vllm.model_executor.determinism import batch_invariant

    assert batch_invariance.SWITCH in vllm.envs.environment_variables
    before = dict(os.environ)
    try:
        batch_invariant.override_envs_for_invariance()
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
    assert {name: changed[name] for name in batch_invariance.NCCL_SETTINGS} == batch_invariance.NCCL_SETTINGS


@pytest.mark.parametrize(("megatron", "count"), [({}, 1), ({"deterministic_mode": True}, 0)])
def test_it_needs_a_deterministic_trainer(megatron, count):
    config = c.Config(engine=c.EngineConfig(batch_invariant=True), megatron=megatron)
    assert sum("megatron.deterministic_mode=true" in problem for problem in c.problems(config)) == count

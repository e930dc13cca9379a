"""The steps of the engine between two agreements to stop, and the arguments that a recipe passes to vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from oreal_megatron.config import Config, ConfigError, EngineConfig
from oreal_megatron.rollout import engine


class Core:
    """vLLM's engine with requests for `steps` steps; a rank is asked to stop during step `stop_at`."""

    def __init__(self, steps: int, stop_at: int | None = None):
        self.steps, self.stop_at, self.taken = steps, stop_at, 0
        self.abort_request = mock.Mock()

    def has_unfinished_requests(self) -> bool:
        return self.taken < self.steps

    def step(self) -> list:
        self.taken += 1
        return []

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.taken >= self.stop_at


def run(core: Core, ranks: int = 1) -> engine.VllmEngine:
    """Run the core's steps on a rank of an engine of so many, without requests."""
    vllm_engine = object.__new__(engine.VllmEngine)
    vllm_engine.config = Config(engine=EngineConfig(tensor=ranks))
    vllm_engine.llm, vllm_engine.stopping = SimpleNamespace(llm_engine=core), False
    vllm_engine.stop_requested = mock.Mock(side_effect=core.stop_requested)
    assert list(vllm_engine._run_requests({}, vllm_engine.config.sampling, (0, 0), 0)) == []
    return vllm_engine


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("steps, checks", [(0, 0), (1, 1), (32, 1), (33, 2), (1000, 32)])
def test_ranks_agree_whether_to_stop_at_every_32nd_step(steps, checks, ranks, monkeypatch):
    """Each agreement of several ranks is a collective, for which all of them wait."""
    agreed = mock.Mock()
    monkeypatch.setattr(dist, "all_reduce", agreed)
    monkeypatch.setattr(engine, "get_tp_group", mock.Mock())
    core = Core(steps)
    assert run(core, ranks).stop_requested.call_count == checks and core.taken == steps
    assert agreed.call_count == (checks if ranks > 1 else 0)


@pytest.mark.parametrize("stop_at, taken", [(0, 1), (1, 1), (2, 33), (33, 33), (34, 65)])
def test_a_stop_ends_generation_at_the_next_agreement(stop_at, taken):
    core = Core(10**6, stop_at)
    assert run(core).stopping and core.taken == taken
    core.abort_request.assert_called_once_with([])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_num_batched_token": 4096}, "vLLM has no argument 'max_num_batched_token'.*max_num_batched_tokens"),
        ({"quantization": None, "absent": 1}, "vLLM has no argument 'absent'"),
    ],
)
def test_an_argument_that_vllm_does_not_have_is_refused_before_it_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(engine, "LLM", mock.Mock(side_effect=AssertionError("vLLM was started")))
    monkeypatch.setattr(engine, "vllm_patches", mock.Mock())
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
    with pytest.raises(ConfigError, match=f"engine.vllm: {message}"):
        engine.VllmEngine(Config(engine=EngineConfig(vllm=arguments)), [0], mock.Mock())


def test_the_arguments_of_vllm_pass():
    engine._check_arguments({"max_num_batched_tokens": 4096, "block_size": 32})

"""The steps of the engine between two agreements to stop, and the arguments that a recipe passes to vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist
from vllm.config import CacheConfig, SchedulerConfig

from oreal_megatron.config import Config, ConfigError, EngineConfig
from oreal_megatron.rollout import engine, engine_arguments


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
    engine_arguments.check_names({"max_num_batched_tokens": 4096, "block_size": 32})


def start_refused(arguments: dict, refuse, monkeypatch) -> None:
    """Start an engine whose vLLM ends in `refuse`."""
    monkeypatch.setattr(engine, "LLM", lambda *_, **given: refuse(given))
    monkeypatch.setattr(engine, "vllm_patches", mock.Mock())
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
    engine.VllmEngine(Config(engine=EngineConfig(vllm=arguments)), [0], mock.Mock())


def refuse_by_type(given: dict) -> None:
    CacheConfig(block_size=given["block_size"])


def refuse_by_rule(given: dict) -> None:
    """Raise as vLLM's checks of several settings do."""
    SchedulerConfig(
        max_num_batched_tokens=given["max_num_batched_tokens"],
        max_num_seqs=given["max_num_seqs"],
        max_model_len=given["max_model_len"],
        is_encoder_decoder=False,
    ).verify_max_model_len(given["max_model_len"])


def refuse_by_name(given: dict) -> None:
    raise KeyError("no such backend")


@pytest.mark.parametrize(
    ("arguments", "refuse", "message"),
    [
        (
            {"enable_prefix_caching": True, "block_size": "abc"},
            refuse_by_type,
            "engine.vllm.block_size = 'abc': block_size: Input should be",
        ),
        (
            {"max_num_batched_tokens": 8},
            refuse_by_rule,
            "engine.vllm.max_num_batched_tokens = 8: max_num_batched_tokens .8. must be",
        ),
        (
            {"block_size": 16, "attention_backend": "none"},
            refuse_by_name,
            "engine.vllm.block_size = 16, engine.vllm.attention_backend = 'none': KeyError: 'no such backend'",
        ),
    ],
)
def test_a_value_that_vllm_refuses_is_bad_input(arguments, refuse, message, monkeypatch):
    with pytest.raises(ConfigError, match=f"^vLLM refuses {message}.*; correct the value, or remove the argument"):
        start_refused(arguments, refuse, monkeypatch)


def test_an_error_of_an_engine_that_has_begun_or_has_no_arguments_stays(monkeypatch):
    def begin(_: dict) -> None:
        engine_arguments.LLMEngine(*[None] * 4)  # fails within its construction

    def end(_: dict) -> None:
        raise OSError("the weights are gone")

    for arguments, refuse in (({"block_size": 16}, begin), ({}, end)):
        with pytest.raises(Exception) as error:
            start_refused(arguments, refuse, monkeypatch)
        assert not isinstance(error.value, ConfigError)

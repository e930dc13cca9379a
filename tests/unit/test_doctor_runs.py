"""Order of the calls in doctor's real runs, the recipe that they run, and the faults that they find; with fakes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_pieces import FakePolicy

from oreal_megatron import config as c
from oreal_megatron.algo.logprob_parity import LogprobMismatch
from oreal_megatron.doctor import real_run_launcher, real_runs
from oreal_megatron.doctor.checks import FAILED
from oreal_megatron.mcore import parallel, trained_models
from oreal_megatron.records import PackingSpec, Rollout, TokenWeights


class RecordingEngine:
    """An engine whose weights are one number; it records what happens to it."""

    replicas = 1

    def __init__(self, events: list[str], can_sleep: bool):
        self.events, self.can_sleep = events, can_sleep
        self.version, self.awake, self.weight, self.logprob = 0, True, 1.0, -1.0

    def generate(self, prompts, sampling, seed):
        assert self.awake
        self.events.append("generate")
        return [
            [Rollout(p, slot, k, (5, 6), "", True, (self.logprob,) * 2, self.version) for k in range(4)]
            for slot, p in enumerate(prompts)
        ]

    def sleep(self):
        self.events.append("sleep")
        self.awake = not self.can_sleep

    def live(self):
        assert self.awake
        return {"weight": torch.tensor([self.weight])}, ""


class RecordingSync:
    """A weight sync that wakes the engine and changes its weights."""

    def __init__(self, engine: RecordingEngine):
        self.engine = engine

    def sync(self, version):
        self.engine.events.append(f"sync {version}")
        self.engine.awake, self.engine.version, self.engine.weight = True, version, 1.0 + version
        return {"weight_sync/verified_parameters": 7.0}


class Policy(FakePolicy):
    """A policy whose updates have a gradient."""

    def update(self, batch, reference_logp, token_weights):
        super().update(batch, reference_logp, token_weights)
        return {"policy/gradient_norm": 1.0}


def all_weights(batch) -> tuple[TokenWeights, dict]:
    return TokenWeights([torch.ones(len(part.labels)) for part in batch.micro_batches]), {}


@pytest.fixture
def run_parts(monkeypatch):
    """Return a function that runs the parts with an engine and a weight sync, and returns what was recorded."""

    def run(engine: RecordingEngine, sync: RecordingSync) -> list[str]:
        events = engine.events

        def build(*parts) -> Policy:
            events.append("models are built")
            return Policy("policy", events)

        monkeypatch.setattr(trained_models, "Policy", build)
        monkeypatch.setattr(trained_models, "NoRewardModel", lambda config: SimpleNamespace(update=all_weights))
        monkeypatch.setattr(parallel, "packing_spec", lambda tokens, arch: PackingSpec(tokens))
        monkeypatch.setattr(real_runs, "collective", lambda: "ranks")
        monkeypatch.setattr(real_runs.policy_weights, "connect", lambda policy, engine: sync)
        session = SimpleNamespace(start_engine=lambda inputs: (engine, None), start_megatron=engine.sleep)
        config = real_runs.run_config("model", gpus=1)
        inputs = SimpleNamespace(config=config, arch=None, folder=SimpleNamespace(tensor=None))
        real_runs.run_parts(session, inputs)
        return [event.split(" 8")[0] for event in events]

    return run


@pytest.mark.parametrize("can_sleep", [True, False])
def test_two_steps_sleep_and_sync_twice_as_a_training_run_does(run_parts, capsys, can_sleep):
    engine = RecordingEngine([], can_sleep)
    assert run_parts(engine, RecordingSync(engine)) == [
        "generate",
        "sleep",  # before the models need the memory
        "models are built",
        "policy",
        "sync 1",
        "generate",
        "sleep",
        "policy",
        "sync 2",
        "generate",
    ]
    lines = [line.removeprefix(real_runs.PREFIX) for line in capsys.readouterr().out.splitlines()]
    assert [line.split(":")[0] for line in lines] == list(real_runs.PARTS)
    assert f"slept {2 * can_sleep} times" in lines[-1]


@pytest.mark.parametrize("faulty_version", [1, 2])
def test_weights_that_do_not_change_are_found_after_either_sync(run_parts, faulty_version):
    class Deaf(RecordingSync):
        def sync(self, version):
            before = self.engine.weight
            metrics = super().sync(version)
            if version == faulty_version:
                self.engine.weight = before
            return metrics

    engine = RecordingEngine([], True)
    with pytest.raises(RuntimeError, match="the same before and after an update"):
        run_parts(engine, Deaf(engine))
    assert engine.events[-1] == f"sync {faulty_version}"


@pytest.mark.parametrize("faulty_version", [0, 1, 2])
def test_an_engine_that_samples_from_other_weights_is_found_after_either_sync(run_parts, faulty_version):
    """CUDA graphs that read the weights' former addresses would do that."""

    class Stale(RecordingEngine):
        def generate(self, prompts, sampling, seed):
            self.logprob = -1.5 if self.version == faulty_version else -1.0
            return super().generate(prompts, sampling, seed)

    engine = Stale([], True)
    with pytest.raises(LogprobMismatch):
        run_parts(engine, RecordingSync(engine))
    assert engine.version == faulty_version


@pytest.mark.parametrize(("gpus", "tensor"), [(0, 1), (1, 1), (2, 2), (3, 1), (8, 2)])
def test_the_recipe_uses_what_a_training_run_uses_on_these_gpus(gpus, tensor):
    config = real_runs.run_config("model", gpus)
    assert c.problems(config) == []
    assert config.offload and config.engine.sleep and config.engine.transport == "direct"
    assert config.engine.tensor == config.parallel.tensor == tensor and config.parallel.sequence is (tensor == 2)
    assert config.engine.enforce_eager is (gpus == 0)
    assert bool(config.engine.vllm.get("cudagraph_capture_sizes")) is (gpus > 0)
    assert config.model.dtype == ("bfloat16" if gpus else "float32")


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (result,) = real_run_launcher.launch_real_runs(8)
    assert result.state == FAILED and result.detail == "8 GPUs, of which there are 4" and "--gpus" in result.fix


def test_every_part_has_a_fix():
    assert list(real_run_launcher.FIXES) == list(real_runs.PARTS)

"""Memory that engine and trainer share: waking beside torch's cache, sleep during a checkpoint, read-only models."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oreal_megatron import config as c
from oreal_megatron.mcore import offload
from oreal_megatron.rollout.device import EngineMemory, is_device_error
from oreal_megatron.training.hooks import TrainingHooks

SIZES = {"weights": 15, "kv_cache": 44}  # GiB on a GPU of 80


class FakeGpu:
    """vLLM's allocator maps physical memory; torch's reserves what was freed until its cache is emptied."""

    def __init__(self):
        self.mapped, self.reserved, self.in_use = sum(SIZES.values()), 0, 0

    def sleep(self, level: int) -> None:
        assert level == 2
        self.mapped = 0

    def wake_up(self, tags: list[str]) -> None:
        self.mapped += sum(SIZES[tag] for tag in tags)
        if self.mapped + self.reserved > 80:
            raise torch.OutOfMemoryError(f"{self.mapped} mapped beside {self.reserved} reserved")

    def train(self, needed: int, remaining: int) -> None:
        self.reserved, self.in_use = max(self.reserved, needed), remaining

    def empty_cache(self) -> None:
        self.reserved = self.in_use


@pytest.mark.parametrize("fault", ["", "no cache is emptied"])
def test_an_engine_wakes_up_beside_memory_that_the_trainer_freed(fault, monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "empty_cache", (lambda: None) if fault else gpu.empty_cache)
    memory = EngineMemory(gpu, can_sleep=True)
    with pytest.raises(torch.OutOfMemoryError) if fault else contextlib.nullcontext():
        for _ in range(2):
            memory.release()
            gpu.train(70, 0)  # offloaded: torch uses nothing, but reserves it
            memory.allocate_weights()
            gpu.train(36, 0)  # the transfer, beside the engine's weights
            memory.allocate_cache()
            assert memory.awake and gpu.mapped == 59


def test_an_engine_that_cannot_sleep_is_left_alone():
    memory = EngineMemory(SimpleNamespace(), can_sleep=False)  # any call of it would raise
    memory.release()
    memory.allocate_weights()
    memory.allocate_cache()
    assert memory.awake


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (ValueError("the prompt is empty"), False),
    ],
)
def test_only_an_error_of_the_gpu_stays(error, stays):
    assert is_device_error(error) is stays


def hooks(events: list[str], stop: bool = False) -> TrainingHooks:
    """Hooks of a run of four steps that saves every second one, with pieces that record what they do."""

    class Saver:
        folder, keep = None, 1

        def poll(self) -> None: ...

        def finish(self) -> None: ...

        def start(self, step: int) -> None:
            events.append(f"save {step}")

        def save(self, step: int, random_state: object) -> None:
            events.append(f"save {step}")

    run = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), delete_old_dumps=lambda kept: None, metrics=None)
    config = c.Config(steps=4, checkpoint=c.CheckpointConfig(every=2))
    return TrainingHooks(
        config, Saver(), run, None, stop, lambda folder, texts: None, Path(),
        sleep_engine=lambda: events.append("sleep"), wake_engine=lambda: events.append("wake"),
    )  # fmt: skip


def test_the_engine_sleeps_while_a_checkpoint_is_copied(monkeypatch):
    monkeypatch.setattr("oreal_megatron.runtime.checkpoint_folders.complete", lambda folder: [])
    events: list[str] = []
    made = hooks(events)
    made.start(0, saved=False)
    for step in (1, 2, 3, 4):
        made.after_step(step)
    assert events == ["sleep", "save 2", "wake", "sleep", "save 4", "wake"]


def test_the_engine_sleeps_for_the_checkpoint_of_a_stopped_run():
    events: list[str] = []
    made = hooks(events, stop=True)
    made.start(0, saved=True)
    with pytest.raises(c.Preempted, match="step 1 is saved"), made.saving_on_stop_request():
        made.after_step(1)
    assert events == ["sleep", "save 1"], "there is nothing to wake for"


def test_what_is_only_read_is_not_copied_to_the_host_again(monkeypatch):
    copies: list[int] = []
    original = offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda storage: copies.append(storage.nbytes()) or original(storage))
    weights = torch.arange(100, dtype=torch.float32)
    parts = offload.MemoryParts(parameters=offload.MemoryPart(lambda: [weights]))
    parts.offload()
    for _ in range(3):
        with parts.on_device("parameters", read_only=True):
            assert weights.sum() == 4950
        assert parts["parameters"].bytes() == 0
    assert copies == [400]
    with parts.on_device("parameters"):
        weights += 1
    with parts.on_device("parameters", read_only=True):
        assert weights.sum() == 5050, "an update in between is not lost"
    assert copies == [400, 400]

"""Starting on a small GPU: models are built while the engine sleeps, each leaves before the next is built, and nothing
is generated before the engine has the weights again. A recorder stands for the engine, because a CPU's cannot sleep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import make_addition_task
import pytest
import small_model
import torch

RECIPE = """
from oreal_megatron.config import *

def small():
    return Config(
        run="{folder}/run", offload=True, tokens_per_micro_batch=512, model=ModelConfig("{folder}/model"),
        engine=EngineConfig(max_model_len=32, kv_cache_gib=0.05),
        sampling=SamplingConfig(max_new_tokens=20), evaluation=EvaluationConfig(max_new_tokens=20),
        data=DataConfig("{folder}/problems.jsonl", "{folder}/held_out.jsonl", prompts_per_step=4),
        supervised=SupervisedConfig(
            "{folder}/demonstrations.jsonl",
            steps=2,
            samples_per_step=4,
            evaluate_every=1,
            optimizer=OptimizerConfig(warmup_steps=1),
        ),
    )
"""


class Recorder:
    """An engine that is asked, and does nothing."""

    def __init__(self, asked: list[str]):
        self.asked, self.awake, self.version = asked, True, 0

    def live(self):
        return {"weight": torch.empty(1)}, "a recorder takes what its loader is given"

    def sleep(self):
        self.asked.append("sleep")
        self.awake = False

    def wake(self):
        self.asked.append("wake")

    def load(self, tensors):
        self.asked.append(f"load {sum(1 for _ in tensors)}")

    def accept(self, version):
        self.asked.append(f"accept {version}")
        self.awake, self.version = True, version

    def close(self):
        self.asked.append("close")


def started(command: str, folder: str) -> list[str]:
    """What a command does with the engine and with the memory of its models, in order."""
    from oreal_megatron import loop
    from oreal_megatron.cli.main import main
    from oreal_megatron.evaluation import score
    from oreal_megatron.mcore import gpt_model, offload
    from oreal_megatron.session import session

    done, make, leave = [], gpt_model.build, offload.MemoryParts.offload
    verifier = SimpleNamespace(close=lambda: None)
    session.start_engine = lambda *_: (Recorder(done), verifier)
    gpt_model.build = lambda *shape: done.append("build") or make(*shape)
    offload.MemoryParts.offload = lambda parts: done.append("leave") or leave(parts)
    score.evaluate = lambda *_: done.append("evaluate") or {"accuracy": 0.0}
    loop.train = lambda config, *_: done.append("train") or Path(config.run, "metrics.jsonl").touch()
    assert main([command, f"{folder}/recipe.py:small"]) == 0
    return done


BUILT = ["build", "leave"]
TENSORS = "load 51"  # of four layers


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("train", [*BUILT, *BUILT, *BUILT, "wake", TENSORS, "accept 0", "evaluate", "train"]),
        ("sft", [*BUILT, *["wake", TENSORS, "accept 0", "evaluate", "sleep"],
                 *["wake", TENSORS, "accept 1", "evaluate", "sleep"],
                 *["wake", TENSORS, "accept 2", "evaluate", "sleep"]]),
    ],
)  # fmt: skip
def test_models_are_built_in_the_room_of_a_sleeping_engine(command, wanted, in_processes, tmp_path):
    small_model.make_model(tmp_path / "model", seed=1)
    make_addition_task.make_problems(tmp_path, 0, training=8, held_out=4, demonstrations=8, below=30)
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=tmp_path))
    assert in_processes(1, started, command, str(tmp_path))[0] == ["sleep", *wanted, "close"]

"""Two machines: namespaces of network, host name and processes. One is lost while the job runs, comes back, and the job
goes on. Started by examples/cluster/launch.sh, as on a real cluster; only ssh is another program here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_model
import torch

ROOT = Path(__file__).parent.parent.parent
ADDRESSES = {"machine-a": "10.77.0.1", "machine-b": "10.77.0.2"}
STEPS = 14
RECIPE = """
from oreal_megatron.config import *

def across():
    return Config(
        run="{folder}/run",
        gpus=2,
        steps={steps},
        policy_freeze_steps=1,
        tokens_per_micro_batch=512,
        model=ModelConfig("{folder}/start"),
        engine=EngineConfig(max_model_len=32, max_num_seqs=64, kv_cache_gib=0.05, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=8, top_p=1.0, max_new_tokens=12),
        data=DataConfig("{folder}/problems.jsonl", prompts_per_step=16),
        verify=VerifyConfig(workers=1),
        checkpoint=CheckpointConfig(every=2),
    )
"""


SPACES = ["--net", "--uts", "--mount", "--pid"]


class Machine:
    """Processes with a network card, a host name and a process table of their own."""

    def __init__(self, hosts: Path):
        words = ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "sleep", "600"]
        self.unshare = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children")
        wait_for(lambda: children.read_text().split(), "the first process of a machine")
        self.pid = int(children.read_text())
        self.enter = ["nsenter", "--target", str(self.pid), *SPACES]
        self.run(f"mount --bind {hosts} /etc/hosts && ip link set lo up")

    def plug_in(self, card: str, name: str) -> None:
        run("ip", "link", "set", card, "netns", str(self.pid), "name", "eth0")
        self.run(f"hostname {name} && ip address add {ADDRESSES[name]}/24 dev eth0 && ip link set eth0 up")

    def run(self, command: str) -> None:
        run(*self.enter, "bash", "-c", command)

    def lose(self) -> None:
        """End it, and with it everything that runs there."""
        if self.unshare.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.unshare.wait()


@pytest.fixture
def machines(tmp_path) -> Iterator[dict[str, Machine]]:
    if subprocess.run(["unshare", *SPACES, "--fork", "true"], capture_output=True).returncode:
        pytest.skip("machines are simulated with namespaces, which need root; nothing less was tried here")
    (tmp_path / "hosts").write_text("".join(f"{a} {name}\n" for name, a in ADDRESSES.items()) + "127.0.0.1 localhost\n")
    found = {name: Machine(tmp_path / "hosts") for name in ADDRESSES}
    connect(found)
    yield found
    for machine in found.values():
        machine.lose()


def connect(machines: dict[str, Machine]) -> None:
    """A cable between two machines."""
    cards = [f"oreal{machine.pid}" for machine in machines.values()]
    run("ip", "link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
    for card, (name, machine) in zip(cards, machines.items(), strict=True):
        machine.plug_in(card, name)


def run(*words: str) -> None:
    subprocess.run(words, check=True, timeout=30)


def wait_for(condition: Any, what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path) -> Path:
    """A recipe for two GPUs, and a policy that answers every question with one digit, by chance right or wrong."""
    from transformers import AutoModelForCausalLM

    small_model.make_model(tmp_path / "start", seed=0, layers=2)
    tokenizer, model = small_model.make_tokenizer(), AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    questions = [f"{number}+{number}=" for number in range(10, 74)]
    template = [tokenizer.encode(f"<|user|>{question}<|assistant|>\\boxed{{0}}<|end|>") for question in questions]
    tokens, digits = torch.tensor(template), torch.tensor([tokenizer.encode(str(digit))[0] for digit in range(10)])
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        tokens[:, -3] = digits[torch.randint(10, (len(tokens),), generator=generator)]
        labels = tokens.clone()
        labels[:, :-10] = -100
        model(input_ids=tokens, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad()
    model.save_pretrained(tmp_path / "start")
    lines = [{"question": question, "gold_answer": str(number % 10)} for number, question in enumerate(questions)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=tmp_path, steps=STEPS))
    return tmp_path


def start(folder: Path, machine: Machine, name: str) -> subprocess.Popen:
    """The launch script on one machine, as ssh would start it there."""
    script = ["bash", str(ROOT / "examples/cluster/launch.sh"), "--recipe", f"{folder}/recipe.py:across", "--no-doctor"]
    script += ["--gpus-per-node", "1", "--nodes", "2", "--rendezvous", "machine-a:29400", "--max-restarts", "3"]
    environment = os.environ | {"PYTHON": sys.executable, "OREAL_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen([*machine.enter, *script], env=environment, stdout=log, stderr=log)


@pytest.mark.full
def test_a_machine_is_lost_and_comes_back_and_the_job_goes_on(machines, job):
    running = {name: start(job, machine, name) for name, machine in machines.items()}

    def told() -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(job.glob("*.log")))

    def saved() -> bool:
        assert all(process.poll() is None for process in running.values()), told()
        return (job / "run/checkpoints/step_000002").is_dir()

    wait_for(saved, "a checkpoint")
    machines["machine-b"].lose()
    assert running["machine-b"].wait(30) != 0
    done = len((job / "run/metrics.jsonl").read_text().splitlines())
    assert done < STEPS, "the job was over before the machine was lost"

    machines["machine-b"] = Machine(job / "hosts")
    machines["machine-a"].run("ip link delete eth0 2> /dev/null || true")  # the old cable's end
    connect(machines)
    running["machine-b"] = start(job, machines["machine-b"], "machine-b")
    assert [process.wait(120) for process in running.values()] == [0, 0], told()
    rows = [json.loads(line) for line in (job / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert sum(row["batch/samples"] > 0 for row in rows) > STEPS / 2, "hardly anything was trained"
    assert (job / f"run/checkpoints/step_{STEPS:06d}").is_dir()

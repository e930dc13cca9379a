"""Stages of tools/gpu_acceptance.py that run whole commands: `oreal doctor`, a task to learn, steps of a real shape.

They need vLLM. A dry run takes the smallest numbers with which the commands end: a minute or two on two CPU cores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu_stages.engine import QWEN_05B
from gpu_stages.machine import NOT_JUDGED, Machine, Row
from gpu_stages.training import SMALL

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("generate", "reward_model", "reference", "policy")


class CommandFailed(RuntimeError):
    """A command ended with another code than 0."""


def doctor(machine: Machine) -> Iterator[Row]:
    """Run `oreal doctor`: a collective, generation, an update and a weight sync with vLLM and Megatron."""
    if not has_vllm():
        yield not_judged("doctor")
        return
    command = ["-m", "oreal_megatron", "doctor", *(["--quick"] if machine.dry else [])]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=_environment(machine))
    print(ended.stdout[-4000:] + ended.stderr[-2000:], file=sys.stderr)
    yield machine.at_most("doctor", "exit code of oreal doctor", ended.returncode, 0)


def learning(machine: Machine) -> Iterator[Row]:
    """Teach a small policy three-digit addition: supervised, then OREAL; its held-out accuracy shall rise."""
    if not has_vllm():
        yield not_judged("learning")
        return
    recipes = f"{ROOT}/examples/recipes/addition.py"
    supervised, trained = ["model.dtype=bfloat16"], ["data.path=runs/addition/problems.jsonl"]
    trained += ["model.dtype=bfloat16", "engine.enforce_eager=false"]
    if machine.dry:
        brief = ["optimizer.warmup_steps=0", "evaluation.problems=20"]
        supervised = [*brief, "supervised.optimizer.warmup_steps=0", "supervised.steps=2"]
        trained = [trained[0], *brief, "reward_model.optimizer.warmup_steps=0", "policy_freeze_steps=0", "steps=1"]
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(machine)
        _run([f"{ROOT}/tools/make_addition_task.py", "runs/addition"], folder, environment)
        _run(["-m", "oreal_megatron", "sft", f"{recipes}:sft", *_settings(supervised)], folder, environment)
        _run(["-m", "oreal_megatron", "train", f"{recipes}:oreal", *_settings(trained)], folder, environment)
        run = Path(folder) / "runs/addition/oreal"
        evaluations, metrics = read_rows(run / "evaluations.jsonl"), read_rows(run / "metrics.jsonl")
    curve = ", ".join(f"{row['step']}: {row['accuracy']:.1%}" for row in evaluations)
    yield Row("learning", "held-out accuracy by step", curve, "measured", NOT_JUDGED)
    gain = evaluations[-1]["low"] - evaluations[0]["high"]
    yield machine.at_least("learning", "gain beyond both 95 % intervals", 100 * gain, 0, "points")
    yield machine.measured("learning", "median step", _median(metrics, "seconds/step"), "s")
    yield machine.measured("learning", "log-probs of engine and trainer, mean difference",
                           _median(metrics, "parity/token_gap_mean"), "nats")  # fmt: skip


def steps(machine: Machine) -> Iterator[Row]:
    """Time steps of a 0.5B policy with random weights, by phase."""
    if not has_vllm():
        yield not_judged("steps")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), machine)
        environment = _environment(machine) | {"OREAL_GPU_FOLDER": folder}
        _run(["-m", "oreal_megatron", "train", f"{ROOT}/tools/gpu_stages/recipe.py:steps"], folder, environment)
        rows = read_rows(Path(folder) / "run/metrics.jsonl")
    measured = rows[1:] or rows  # the first warms up
    yield machine.at_least("steps", "steps that ended", len(rows), 1 if machine.dry else 4)
    for phase in PHASES:
        yield machine.measured("steps", phase, _median(measured, f"seconds/{phase}"), "s")
        speed = _median(measured, f"speed/tokens_per_second_per_gpu/{phase}")
        yield machine.measured("steps", f"{phase}, tokens", speed, "1/s")
        if not machine.dry:  # the peak of a CPU is not known
            yield machine.measured("steps", f"{phase}, MFU", _median(measured, f"speed/mfu/{phase}"), "")
    yield machine.measured("steps", "weight sync", _median(measured, "seconds/weight_sync"), "s")


def make_inputs(folder: Path, machine: Machine) -> None:
    """Write a Qwen2 policy with random weights, its tokenizer, and problems.

    So many tokens end a response that its mean length is half of the longest.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    shape, layers = (SMALL, 2) if machine.dry else (QWEN_05B, 24)
    vocabulary, mean_length = shape["vocab_size"], 16 if machine.dry else 1024
    # transformers reads a Qwen2's tokenizer as byte-pair encoding: without merges, texts are encoded by character.
    texts = ["<pad>", "<end>", *string.digits]
    texts += [f"<{number}>" for number in range(len(texts), vocabulary)]
    words = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = dict(eos_token="<end>", pad_token="<pad>", unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    ends = [1, *range(len(texts) - vocabulary // mean_length, len(texts))]
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape, num_hidden_layers=layers, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=ends, pad_token_id=0,
    )  # fmt: skip
    policy = Qwen2ForCausalLM(config) if machine.dry else Qwen2ForCausalLM(config).bfloat16()
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    lines = [json.dumps({"question": f"{number:08d}", "answer": "0"}) for number in range(64)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")


def has_vllm() -> bool:
    """Return whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def not_judged(stage: str) -> Row:
    """Return the row of a stage that needs vLLM where there is none."""
    return Row(stage, "stage", "vLLM is not installed", "vLLM", NOT_JUDGED)


def read_rows(file: Path) -> list[dict[str, float]]:
    """Return the JSON objects of a file, one a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _median(rows: list[dict[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else float("nan")


def _settings(assignments: list[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def _environment(machine: Machine) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return environment | ({"OREAL_GPU_DRY": "1"} if machine.dry else {})


def _run(command: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run a Python command in a folder; its output is shown. Raises CommandFailed."""
    ended = subprocess.run([sys.executable, *command], cwd=folder, env=environment, stdout=sys.stderr)
    if ended.returncode:
        raise CommandFailed(f"{Path(command[0]).name} {' '.join(command[1:3])} ended with code {ended.returncode}")

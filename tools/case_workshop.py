"""Models, recipes, commands and the registry of checks for tools/field_cases.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from small_model import SPECIAL, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = [{"question": f"{a}+{b}=", "gold_answer": str(a + b)} for a in range(4) for b in range(4, 8)]
RECIPE = """
from oreal_megatron.config import *

def recipe():
    return Config(
        run={run!r}, steps=3, policy_freeze_steps=0, tokens_per_micro_batch=512, model=ModelConfig({model!r}),
        engine=EngineConfig(max_model_len=64, max_num_seqs=64, kv_cache_gib=0.05, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=4, top_p=1.0, max_new_tokens=16),
        data=DataConfig({data!r}, prompts_per_step=8), verify=VerifyConfig(workers=1),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1)),
        checkpoint=CheckpointConfig(every=1, keep=2), evaluation=EvaluationConfig(every=0, max_new_tokens=16),
    )
"""


@dataclass(frozen=True)
class Result:
    """Exit code and everything that a command printed."""

    code: int
    text: str

    def refused(self, *words: str) -> str | None:
        """Return None if the command ended with exit code 2 and a message with these words, else what happened."""
        missing = [word for word in words if word not in self.text]
        if self.code == 2 and not missing and "Traceback" not in self.text:
            return None
        lacks = f", the message lacks {missing}" if missing else ""
        return f"exit code {self.code}{lacks}: {' '.join(self.text.split())[-300:]}"


class WouldLoad(Exception):
    """A command passed all checks of its input and would load models now."""


class Workshop:
    """A folder in which cases are tried: a model, problems, recipes, and one real run shared by several checks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = 0

    def new(self, name: str = "case") -> Path:
        """Return a new folder."""
        self.number += 1
        path = self.folder / f"{name}_{self.number}"
        path.mkdir()
        return path

    @cached_property
    def model(self) -> Path:
        r"""A policy that answers \boxed{7} or \boxed{8} with equal chances, whatever the question."""
        path = self.folder / "model"
        make_model(path, seed=0)
        weights, tokenizer = load_file(path / "model.safetensors"), make_tokenizer()
        for name, tensor in weights.items():  # layers add nothing: the next token depends on this one alone
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        weights["model.embed_tokens.weight"] = torch.eye(*weights["model.embed_tokens.weight"].shape)
        head = weights["lm_head.weight"].zero_()
        numbers = {word: tokenizer.convert_tokens_to_ids(word) for word in [*SPECIAL, *r"\boxed{}78"]}
        chain = [SPECIAL[2], *r"\boxed{", ("7", "8"), "}", SPECIAL[3]]
        for before, after in zip(chain, chain[1:], strict=False):
            for source in before if isinstance(before, tuple) else (before,):
                for target in after if isinstance(after, tuple) else (after,):
                    head[numbers[target], numbers[source]] = 2.0  # times sqrt(hidden), from the norm
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path

    def model_with(self, change: Callable[[Path], Any]) -> Path:
        """Return a copy of the model folder after a change."""
        copy = self.new("model") / "copy"
        shutil.copytree(self.model, copy)
        change(copy)
        return copy

    def problems(self, *lines: str | Mapping[str, Any], name: str = "problems.jsonl") -> Path:
        """Write lines, or the usual problems, into a file of a new folder."""
        path = self.new("data") / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines or PROBLEMS]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    def recipe(self, **changes: Path | str) -> tuple[str, Path]:
        """Return a recipe's name and its run folder; changes: run, model, data."""
        folder = self.new("recipe")
        names = {"run": folder / "run", "model": self.model, "data": self.problems()} | changes
        (folder / "recipe.py").write_text(RECIPE.format(**{key: str(value) for key, value in names.items()}))
        return str(folder / "recipe.py"), Path(names["run"])

    @cached_property
    def finished_run(self) -> tuple[str, Path]:
        """Recipe and folder of a real run of three steps, with the checkpoints of steps 2 and 3."""
        recipe, run = self.recipe()
        result = self.command("train", recipe)
        if result.code:
            raise RuntimeError(f"the run that this check needs failed: {result.text[-2000:]}")
        return recipe, run

    def copied_run(self) -> Path:
        """Return a copy of the finished run, in a folder of its own."""
        copy = self.new("run") / "copy"
        shutil.copytree(self.finished_run[1], copy)
        return copy

    def command(self, *words: str, env: Mapping[str, str] | None = None, timeout: float = 240) -> Result:
        """Run `oreal WORDS` as a user does."""
        return run_process(sys.executable, "-m", "oreal_megatron", *words, env=env, timeout=timeout)

    def until_loading(self, *words: str) -> Result:
        """Run `oreal WORDS` in this process up to the point where models would be loaded: exit code 0 there."""
        from oreal_megatron.cli import main
        from oreal_megatron.session.session import Session

        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            with mock.patch.object(Session, "__enter__", side_effect=WouldLoad):
                try:
                    code = main.main(list(words))
                except WouldLoad:
                    code = 0
                except SystemExit as leaving:
                    code = int(leaving.code or 0)
                except Exception as error:
                    return Result(1, f"Traceback: {type(error).__name__}: {error}")
        return Result(code, output.getvalue())


def run_process(*words: str, env: Mapping[str, str] | None = None, timeout: float = 240) -> Result:
    """Run a command from the checkout; exit code -1 if it had to be ended."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"} | (env or {})
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return Result(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return Result(-1, f"still running after {timeout:g} s: {process.communicate()[0]}")


Case = dict[str, Any]  # one line of the cases file: kind, area, command, input, right
Check = Callable[[Case, Workshop], "str | None"]  # None: right; else what happened
CHECKS: dict[str, Check] = {}


def case(kind: str) -> Callable[[Check], Check]:
    """Register the check of one kind of case."""

    def register(check: Check) -> Check:
        assert kind not in CHECKS, kind
        CHECKS[kind] = check
        return check

    return register


def outcomes(cases: list[Case], workshop: Workshop) -> Iterator[tuple[str, str | None]]:
    """Yield the kind of each case and what is wrong, None if nothing is."""
    for one_case in cases:
        check = CHECKS.get(one_case["kind"])
        try:
            yield one_case["kind"], check(one_case, workshop) if check else "no check is registered for it"
        except Exception as error:  # a check that cannot be made is no pass
            yield one_case["kind"], f"{type(error).__name__}: {error}"

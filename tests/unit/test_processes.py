"""Waiting for other ranks as stacks show it: collectives, and on GPUs the calls on which the host waits."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import queue
import runpy
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oreal_megatron.runtime import processes

CALLS = [
    "norm.item()",
    "norm.cpu()",
    "norm.tolist()",
    "norm.nonzero()",
    "norm.synchronize()",
    'norm.to("cpu")',
    "float(norm)",
    "abs(float(norm))",
    "largest(0, [1, 2], norm.item())",
    "norm.item() + other.item()",
    "largest(\n    0,\n    [é for é in (1, 2)], norm\n    .item(),\n)",
]
FOLDERS = (
    "oreal_megatron/mcore",
    "oreal_megatron/reshard",
    "site-packages/megatron/core",
    "site-packages/vllm/v1/worker/gpu",
)
OTHER_CALLS = ["norm.work()", "largest(norm.work(), other.item())", "float(norm.work())", "norm.work()  # .item()"]
WORKERS = Path(*importlib.util.find_spec("vllm").submodule_search_locations, "v1/worker")


def waits_while(run: Callable[[Any], Any], file: Path, on_gpu: bool, seconds: float) -> bool:
    """Return whether another thread sees the main thread wait while it is in C code, below the functions of a file.

    `run` gets a value whose methods do not return until then.
    """
    release: queue.SimpleQueue[None] = queue.SimpleQueue()
    observed, returned = [], threading.Event()

    class Blocking:
        """A value whose methods block in C until another thread has observed the stacks."""

        __float__ = item = cpu = to = tolist = nonzero = synchronize = work = staticmethod(release.get)

    def observe() -> None:
        main = threading.main_thread().ident
        while sys._current_frames()[main].f_code.co_filename != str(file) and not returned.is_set():
            pass  # the main thread is not there yet
        stop = time.monotonic() + seconds
        while not (waits := processes.in_collective(on_gpu)) and time.monotonic() < stop and not returned.is_set():
            time.sleep(0.001)
        observed.append(waits)
        release.put(None)

    thread = threading.Thread(target=observe)
    thread.start()
    try:
        run(Blocking())
    except (TypeError, AttributeError):  # what the methods return is no number and no tensor
        pass
    finally:
        returned.set()
    thread.join()
    return observed[0]


def waits_in(code: str, file: Path, on_gpu: bool, seconds: float) -> bool:
    """Return `waits_while` for a call of `code` in a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"def run(norm, other, largest):\n    return {code.replace(chr(10), chr(10) + '    ')}\n")
    run = runpy.run_path(str(file))["run"]
    other = SimpleNamespace(item=lambda: 0)
    return waits_while(lambda norm: run(norm, other, lambda *values: values), file, on_gpu, seconds)


@pytest.mark.parametrize("code", CALLS)
def test_reading_a_tensor_in_the_trainer_is_waiting_for_others_on_a_gpu(code, tmp_path):
    for number, folder in enumerate(FOLDERS):
        assert waits_in(code, tmp_path / folder / f"busy_{number}.py", on_gpu=True, seconds=60)


@pytest.mark.parametrize("code", CALLS[:1])
def test_on_a_cpu_or_elsewhere_it_is_work(code, tmp_path):
    assert not waits_in(code, tmp_path / "oreal_megatron/mcore/cpu.py", on_gpu=False, seconds=0.05)
    assert not waits_in(code, tmp_path / "oreal_megatron/verify/elsewhere.py", on_gpu=True, seconds=0.05)


@pytest.mark.parametrize("code", OTHER_CALLS)
def test_another_call_on_a_line_that_also_reads_a_tensor_is_work(code, tmp_path):
    assert not waits_in(code, tmp_path / "oreal_megatron/mcore/work.py", on_gpu=True, seconds=0.05)


def output_functions() -> Iterator[Any]:
    """Iterate over the functions of the installed vLLM that wait for the output of a step, without importing it."""
    for file in sorted(WORKERS.rglob("*.py")):
        text = file.read_text()
        if "def get_output(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == "get_output":
                node.returns = None
                yield pytest.param(node, file, id=f"{file.name}:{node.lineno}")


@pytest.mark.parametrize("function, file", output_functions())
def test_waiting_for_the_output_of_a_step_of_the_engine_is_waiting_for_others(function, file):
    """The ranks of an engine that is split over several do so while one of them hangs."""
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([function], []), file, "exec"), names)

    class Output:
        """An output whose events have not happened."""

        sampled_token_ids_cpu = torch.zeros(1, 1)
        pooler_output_cpu = ()

        def __init__(self, event: Any):
            self.copy_event = self.async_copy_ready_event = event

    assert waits_while(lambda event: names["get_output"](Output(event)), file, on_gpu=True, seconds=60)


def test_the_installed_vllm_has_such_functions():
    assert len(list(output_functions())) >= 2


@pytest.mark.parametrize(
    "function", [torch.accelerator.synchronize, torch.cuda.synchronize, torch.cuda.Event.synchronize,
                 torch.cuda.Stream.synchronize], ids=lambda function: f"{function.__module__}.{function.__qualname__}",
)  # fmt: skip
def test_the_call_in_which_torch_itself_waits_is_known(function):
    """It is the innermost frame: the file that asked for it is further out."""
    source = textwrap.dedent(inspect.getsource(function))
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [ast.get_source_segment(source, node) or "" for node in nodes]
    assert any(processes.WAITING_CALL.search(call) for call in calls), calls

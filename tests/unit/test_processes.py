"""Waiting for other ranks as stacks show it: collectives, and on GPUs the calls on which the host waits."""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path

import pytest

from oreal_megatron.runtime import processes

CALLS = [
    "norm.item()",
    "norm.cpu()",
    "norm.tolist()",
    "norm.nonzero()",
    "norm.synchronize()",
    "float(norm)",
    "abs(float(norm))",
    "largest(0, [1, 2], norm.item())",
    "norm.item() + other.item()",
    "largest(\n    0,\n    [é for é in (1, 2)], norm\n    .item(),\n)",
]
OTHER_CALLS = ["norm.work()", "largest(norm.work(), other.item())", "float(norm.work())", "norm.work()  # .item()"]


def waits_in(code: str, file: Path, on_gpu: bool, seconds: float) -> bool:
    """Return whether another thread sees the main thread wait while it blocks in C code, in a call of `code`."""
    lock, observed = threading.Lock(), []
    lock.acquire()

    class Blocking:
        """A value whose methods block in C until another thread has observed the stacks."""

        __float__ = staticmethod(lock.acquire)
        item = cpu = tolist = nonzero = synchronize = work = staticmethod(lock.acquire)

    class Ready:
        item = staticmethod(lambda: 0)

    def observe() -> None:
        main = threading.main_thread().ident
        while sys._current_frames()[main].f_code.co_filename != str(file):  # the main thread is not there yet
            pass
        stop = time.monotonic() + seconds
        while not (waits := processes.in_collective(on_gpu)) and time.monotonic() < stop:
            time.sleep(0.001)
        observed.append(waits)
        lock.release()

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"def run(norm, other, largest):\n    return {code.replace(chr(10), chr(10) + '    ')}\n")
    run = runpy.run_path(str(file))["run"]
    thread = threading.Thread(target=observe)
    thread.start()
    try:
        run(Blocking(), Ready(), lambda *values: values)
    except TypeError:  # __float__ returned True
        pass
    thread.join()
    return observed[0]


@pytest.mark.parametrize("code", CALLS)
def test_reading_a_tensor_in_the_trainer_is_waiting_for_others_on_a_gpu(code, tmp_path):
    for number, folder in enumerate(("oreal_megatron/mcore", "oreal_megatron/reshard", "site-packages/megatron/core")):
        assert waits_in(code, tmp_path / folder / f"busy_{number}.py", on_gpu=True, seconds=60)


@pytest.mark.parametrize("code", CALLS[:1])
def test_on_a_cpu_or_elsewhere_it_is_work(code, tmp_path):
    assert not waits_in(code, tmp_path / "oreal_megatron/mcore/cpu.py", on_gpu=False, seconds=0.05)
    assert not waits_in(code, tmp_path / "oreal_megatron/verify/elsewhere.py", on_gpu=True, seconds=0.05)


@pytest.mark.parametrize("code", OTHER_CALLS)
def test_another_call_on_a_line_that_also_reads_a_tensor_is_work(code, tmp_path):
    assert not waits_in(code, tmp_path / "oreal_megatron/mcore/work.py", on_gpu=True, seconds=0.05)

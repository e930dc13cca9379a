"""Signals to a real process: the first is a notice, its echo is none, a later one ends the process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest

from oreal_megatron.runtime import preemption

PROGRAM = """
import time
from oreal_megatron.runtime import preemption
preemption.SAME_REQUEST_S = {same}
request = preemption.StopRequest().__enter__()
print("listening", bool(request), flush=True)
while not request:
    time.sleep(0.01)
print("noticed", flush=True)
time.sleep({then})
print("saved", flush=True)
"""


def start(same: float, then: float) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM.format(same=same, then=then)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening False\n"
    return process


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_notice_lets_the_process_save_and_its_echo_is_none(number):
    process = start(same=60, then=0.3)
    process.send_signal(number)
    assert process.stdout.readline() == "noticed\n"
    process.send_signal(signal.SIGTERM)  # what torchrun passes on of the same notice
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved\n") and err.count("received; finishing the update") == 1


def test_a_second_notice_ends_the_process_at_once():
    process = start(same=0.05, then=60)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "noticed\n"
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert process.returncode == 4 and "saved" not in process.stdout.read()


def test_the_handlers_of_before_are_restored():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.StopRequest():
        assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before

"""The worker pool: limits from outside, replacement, and no other item lost or reordered."""

import os
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from oreal_megatron.verify.worker_pool import Pool, PoolBroken

SCRIPT = [sys.executable, str(Path(__file__).parents[2] / "helpers/scripted_worker.py")]


@pytest.fixture
def pool():
    made = []

    def make(**settings):
        made.append(Pool(**{"workers": 2, "timeout_s": 0.5, "memory_mib": 512, "command": SCRIPT, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def alive(pid):
    """Whether a process runs: one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("order", ["sleep 30", "spin"])
def test_a_late_worker_is_killed_and_its_item_is_unknown(pool, order):
    grading = pool(workers=1)
    grading.submit("response", "a", "a").result(timeout=20)
    (pid,) = grading.pids()
    start = time.monotonic()
    late = grading.submit("response", "a", order).result(timeout=20)
    assert (late.outcome, late.method) == ("unknown", "time-out")
    assert 0.5 <= late.seconds and time.monotonic() - start < 10  # the limit is 0.5 s
    assert grading.submit("response", "b", "b").result(timeout=20).outcome == "correct"
    assert not alive(pid) and grading.replaced == 1


@pytest.mark.parametrize("order", ["die", "die 0", "kill", "half"])
def test_a_dead_worker_is_replaced_and_its_item_is_unknown(pool, order):
    grading = pool(workers=1)
    futures = [grading.submit("response", "a", text) for text in ("a", order, "a", order, "a")]
    assert [f.result(timeout=20).outcome for f in futures] == ["correct", "unknown", "correct", "unknown", "correct"]
    assert futures[1].result().method == "error" and grading.replaced == 2


def test_memory_is_capped(pool):
    grading = pool(workers=1, timeout_s=20.0, memory_mib=256)
    assert grading.submit("response", "a", "hog 100").result(timeout=20).outcome == "incorrect"
    assert grading.submit("response", "a", "hog 400").result(timeout=20).outcome == "unknown"
    assert grading.submit("response", "a", "a").result(timeout=20).outcome == "correct"


def test_hostile_items_neither_lose_nor_reorder_the_others(pool):
    grading = pool(timeout_s=3.0)
    orders = {20: "sleep 30", 50: "die", 51: "kill", 90: "spin", 130: "half"}
    futures = [grading.submit("response", str(n), orders.get(n, str(n))) for n in range(200)]
    results = [future.result(timeout=30) for future in futures]
    assert {n for n, result in enumerate(results) if result.outcome == "unknown"} == set(orders)
    assert all(result.extracted == str(n) for n, result in enumerate(results) if n not in orders)


def test_each_item_has_its_own_clock(pool):
    """Ten items of 0.3 s in a row on one worker take longer than the limit of 2 s; none is late."""
    grading = pool(workers=1, timeout_s=2.0)
    futures = [grading.submit("response", "a", "sleep 0.3") for _ in range(10)]
    assert [future.result(timeout=20).outcome for future in futures] == ["incorrect"] * 10


def test_works_from_many_threads(pool):
    grading, results = pool(), []

    def work(name):
        futures = [grading.submit("response", f"{name}-{n}", f"{name}-{n}") for n in range(50)]
        results.extend(future.result(timeout=20).outcome for future in futures)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["correct"] * 400


def test_submit_never_blocks_behind_a_stuck_worker(pool):
    """1 MB each: far more than a pipe holds, while both workers sleep."""
    grading = pool(timeout_s=4.0)
    stuck = [grading.submit("response", "a", "sleep 30") for _ in range(2)]
    time.sleep(0.3)
    start = time.monotonic()
    big = [grading.submit("response", "x" * 2**20, "x" * 2**20) for _ in range(8)]
    assert time.monotonic() - start < 3.0
    assert [f.result(timeout=20).outcome for f in stuck + big] == ["unknown"] * 2 + ["correct"] * 8


def test_close_ends_the_processes_and_cancels_what_waits(pool):
    grading = pool(timeout_s=30.0)
    futures = [grading.submit("response", "a", "sleep 20") for _ in range(6)]
    time.sleep(0.3)
    pids = grading.pids()
    grading.close()
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
    assert not wait(futures, timeout=0).not_done and all(future.cancelled() for future in futures)
    with pytest.raises(PoolBroken, match="closed"):
        grading.submit("response", "a", "a")


def test_workers_that_never_start_end_in_a_sentence(pool):
    grading = pool(command=[*SCRIPT, "stillborn"])
    future = grading.submit("response", "a", "a")
    with pytest.raises(PoolBroken, match="died before they were ready"):
        future.result(timeout=20)


def test_a_worker_ends_with_its_parent():
    """The input of the worker closes when the parent is gone, however it went."""
    read, write = os.pipe()
    if os.fork() == 0:
        pool = Pool(workers=1, command=SCRIPT)
        pool.submit("response", "a", "a").result()
        os.write(write, str(pool.pids()[0]).encode())
        os.kill(os.getpid(), 9)
    os.close(write)
    os.wait()
    pid = int(os.read(read, 100))
    os.close(read)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_bad_settings_are_a_sentence():
    with pytest.raises(ValueError, match="at least one worker"):
        Pool(workers=0)

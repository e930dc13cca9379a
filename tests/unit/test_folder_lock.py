"""One writer per folder: live holders are named, dead ones replaced, takers do not replace each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import folder_lock, processes
from oreal_megatron.runtime.folder_lock import FolderLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "REFRESH_S", 0.02)
    monkeypatch.setattr(folder_lock, "SILENT_S", 0.4)


def write_lock(folder: Path, **changes: object) -> Path:
    """Write the lock of a holder like this process, except for some fields."""
    folder.mkdir(exist_ok=True)
    file = folder / folder_lock.NAME
    file.write_text(json.dumps(folder_lock._own_identity() | changes))
    return file


def ended_process() -> int:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.pid


def test_a_live_holder_is_named_and_its_lock_stays(tmp_path):
    with FolderLock(tmp_path) as lock:
        content = lock.path.read_text()
        with pytest.raises(ConfigError, match=rf"by process {os.getpid()} on .*, since 20.*; a folder has one writer"):
            FolderLock(tmp_path).acquire()
        assert lock.path.read_text() == content
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize(
    "changes",
    [{"pid": ended_process()}, {"start": "1"}],  # the id of a process that has ended may be another's now
    ids=["ended", "id used again"],
)
def test_a_holder_of_this_machine_that_has_ended_is_replaced_at_once(tmp_path, changes, monkeypatch, caplog):
    monkeypatch.setattr(folder_lock, "SILENT_S", 1000.0)
    write_lock(tmp_path, **changes)
    with FolderLock(tmp_path):
        assert "is gone; its lock is taken over" in caplog.text


def test_a_holder_on_another_machine_is_alive_while_it_refreshes(tmp_path):
    file = write_lock(tmp_path, machine="other", host="node7", pid=5)
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="by process 5 on node7"):
            FolderLock(tmp_path).acquire()
    finally:
        stop.set()
        thread.join()
    with FolderLock(tmp_path):  # nothing refreshes it any more
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_lock_that_says_nothing_is_watched_too(tmp_path, text):
    write_lock(tmp_path).write_text(text)
    with FolderLock(tmp_path):
        pass


def test_of_many_takers_one_gets_a_lock_that_was_left_behind(tmp_path):
    """All see the same dead holder; each round starts anew."""
    for _ in range(10):
        write_lock(tmp_path, pid=ended_process())
        held, refused, begin, end = [], [], threading.Barrier(8), threading.Barrier(8)

        def take(held=held, refused=refused, begin=begin, end=end) -> None:
            lock = FolderLock(tmp_path, on_loss=lambda: held.append("lost"))
            begin.wait()
            try:
                lock.acquire()
                held.append("held")
            except ConfigError:
                refused.append(1)
            end.wait()
            lock.release()

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert held == ["held"] and len(refused) == 7


def test_no_taker_finds_the_name_free_while_another_takes_over(tmp_path, monkeypatch):
    """Between the claim and the new lock, a second taker waits and a creation fails."""
    write_lock(tmp_path, pid=ended_process())
    seen, rename = [], os.rename

    def watched_rename(source, target):
        seen.append((Path(target).exists(), FolderLock(tmp_path)._create()))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched_rename)
    with FolderLock(tmp_path):
        assert seen == [(True, False)]


def test_a_taker_that_read_an_older_lock_leaves_the_new_one(tmp_path):
    gone = write_lock(tmp_path, pid=ended_process())
    holder = json.loads(gone.read_text())
    with FolderLock(tmp_path) as lock:
        content = lock.path.read_text()
        assert not FolderLock(tmp_path)._take_over(holder)
        assert lock.path.read_text() == content and lock._is_own()


def test_a_claim_whose_process_ended_is_reported(tmp_path):
    write_lock(tmp_path, pid=ended_process())
    (tmp_path / folder_lock.CLAIM).write_text("{}")
    with pytest.raises(ConfigError, match=r"has ended in between.*delete .*writer.lock.claim"):
        FolderLock(tmp_path).acquire()


def test_a_holder_that_was_replaced_while_it_was_suspended_is_told(tmp_path):
    lost = threading.Event()
    lock = FolderLock(tmp_path, on_loss=lost.set)
    lock.acquire()
    lock.path.unlink()
    write_lock(tmp_path, machine="other")
    assert lost.wait(5)
    lock.release()
    assert lock.path.exists(), "another process's lock is not deleted"


def test_a_refresh_is_seen_by_others(tmp_path):
    with FolderLock(tmp_path) as lock:
        before = lock.path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while lock.path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        FolderLock(tmp_path / "file/run").acquire()


def test_start_times_tell_processes_apart():
    assert processes.start_time(os.getpid()) == processes.start_time(os.getpid()) != ""
    assert processes.start_time(ended_process()) == ""

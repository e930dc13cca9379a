"""Watchdog of a process without peers: its own errors do not end a job, those of the store do."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from oreal_megatron import config as c
from oreal_megatron.runtime import processes, watchdog


def start_failing_once(monkeypatch, tmp_path, error: Exception) -> tuple[watchdog.Watchdog, list[str], threading.Event]:
    """Start a watchdog whose first diagnosis raises an error; return it, the alarms, and the event of a second one."""
    alarms, again, rounds = [], threading.Event(), []

    def diagnose(*_):
        rounds.append(None)
        if len(rounds) == 1:
            raise error
        again.set()

    monkeypatch.setattr(watchdog, "diagnose", diagnose)
    monkeypatch.setattr(watchdog.Watchdog, "_end_without_store", lambda self, reason: alarms.append(reason))
    config = c.Config(run=str(tmp_path / "run"), watchdog=c.WatchdogConfig(every_s=0.01))
    return watchdog.Watchdog(config), alarms, again


def test_an_error_of_the_watchdog_itself_does_not_end_the_job(monkeypatch, tmp_path, caplog):
    watching, alarms, again = start_failing_once(monkeypatch, tmp_path, TypeError("no line"))
    assert again.wait(30), "no further round"
    watching.stop()
    assert not alarms and "the watchdog failed in this round" in caplog.text


def test_an_error_of_the_store_ends_the_job(monkeypatch, tmp_path):
    watching, alarms, again = start_failing_once(monkeypatch, tmp_path, RuntimeError("Connection reset"))
    watching.threads[0].join(30)
    watching.stop()
    assert alarms == ["RuntimeError: Connection reset"] and not again.is_set()


@pytest.mark.parametrize("line", [None, 0, 10**9])
def test_a_frame_without_a_line_is_in_no_collective(line):
    frame = SimpleNamespace(f_code=SimpleNamespace(co_filename="megatron/core/none.py"), f_lineno=line)
    assert not processes._is_collective(frame)

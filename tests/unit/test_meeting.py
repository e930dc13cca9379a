"""Meeting of the processes of a job: at once, or a sentence within seconds."""

from __future__ import annotations

import os
import time

import pytest
from torch.distributed.run import parse_args

from oreal_megatron.cli import main
from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import parallel
from oreal_megatron.runtime import launcher


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "3"},
        {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},  # `oreal --processes 1`
    ],
)
def test_one_process_needs_no_address_of_another(rest, monkeypatch):
    groups = []
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **options: groups.append(options))
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in ({"MASTER_ADDR": "bogus.invalid", "MASTER_PORT": "29500"} | rest).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set below is gone afterwards
    parallel.start_process_group(5.0)
    assert [(options["rank"], options["world_size"]) for options in groups] == [(0, 1)]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"MASTER_ADDR": "bogus.invalid", "MASTER_PORT": "29500"},
            "MASTER_ADDR is 'bogus.invalid', which does not resolve",
        ),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is 0"),
    ],
)
def test_an_address_at_which_nobody_meets_is_refused_at_once(variables, says, monkeypatch):
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | variables).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=says):
        parallel.start_process_group()


def test_a_process_that_waits_says_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(parallel, "WAIT_S", 0.05)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    with parallel._announced_wait():
        time.sleep(0.3)
    assert "still waiting for" in caplog.text and "MASTER_ADDR=10.0.0.9" in caplog.text
    caplog.clear()
    with parallel._announced_wait():
        pass
    time.sleep(0.2)
    assert not caplog.records


def test_processes_of_one_machine_meet_at_its_loopback_address():
    for words, address in ((["--processes", "2"], "127.0.0.1"), (["--processes", "2", "--rendezvous", "a:1"], None)):
        args = main.parser("train").parse_args([*words, "train", "r.py"])
        parsed = parse_args([*launcher.torchrun(args, "/tmp/x"), "-m", "oreal_megatron"])
        assert (parsed.local_addr, parsed.standalone) == (address, address is not None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "2"], "--nodes 2 needs --rendezvous HOST:PORT"),
        (["--rendezvous", "a:b"], "--rendezvous is 'a:b' (The port number"),
        (["--rendezvous", ":29400"], "--rendezvous is ':29400' (The hostname"),
        (["--logs", "{file}/logs"], "file/logs, which cannot be written to (Not a directory); choose another"),
        (["--logs", "{file}"], "file, which cannot be written to (File exists); choose another"),
        (["--logs", "/proc/logs"], "--logs names /proc/logs, which cannot be written to"),
    ],
)
def test_launch_options_that_cannot_be_are_bad_input(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launcher, "run", lambda _: pytest.fail("processes were started"))
    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file") for word in words]
    assert main.main(["--processes", "2", *words, "train", "recipe.py"]) == 2
    assert says in capsys.readouterr().err

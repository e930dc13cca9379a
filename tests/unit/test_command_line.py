"""Command lines that cannot be meant: exit code 2 and a sentence, before anything is computed."""

from __future__ import annotations

import argparse

import pytest

from oreal_megatron.cli import arguments
from oreal_megatron.cli.arguments import SHARED
from oreal_megatron.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("started_by", ["--processes", "torchrun", "torchrun of one", "a scheduler"])
def test_a_command_that_works_alone_is_refused_in_several_processes(command, started_by, monkeypatch):
    if started_by.startswith("torchrun"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "1" if started_by == "torchrun of one" else "2")
    args = argparse.Namespace(command=command, processes=2 if started_by == "--processes" else None)
    several = started_by in ("--processes", "torchrun")
    assert arguments.works_alone(args) == (several and command not in SHARED)


def test_the_refusal_is_a_sentence(capsys):
    assert main(["--processes", "2", "verify", "a.jsonl", "b.jsonl"]) == 2
    assert "verify works in one process; start it without --processes" in capsys.readouterr().err


def test_the_commands_that_share_work_exist():
    assert set(SHARED) <= set(COMMANDS)


@pytest.mark.parametrize("option", ["--picture", "--summary"])
def test_an_output_that_cannot_be_written_is_refused_first(option, tmp_path, capsys):
    for name, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "does not exist"),
        ("/proc/x.json", "/proc/x.json"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(["report", "nowhere", option, str(name)])
        assert leaving.value.code == 2 and says in capsys.readouterr().err
    assert arguments.output_file(str(tmp_path / "x")) == tmp_path / "x"


@pytest.mark.parametrize("second", ["x", "./x", "link"])
@pytest.mark.parametrize(
    "words",
    [("report", "--html", "--picture"), ("report", "--summary", "--heat-map"), ("plan", "--json", "--picture")],
)
def test_two_outputs_of_a_command_are_two_files(words, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("former")
    (tmp_path / "link").symlink_to("x")
    command, *options = words
    assert main([command, "nowhere", options[0], "x", options[1], second]) == 2
    assert "are one file, which would be written twice" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "former" and len(list(tmp_path.iterdir())) == 2


def test_evaluation_outputs_are_refused_before_anything_is_loaded(tmp_path, capsys):
    for name, says in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "does not exist"), ("/proc/x", "/proc/x")):
        with pytest.raises(SystemExit) as leaving:
            main(["evaluate", "recipe.py", "--rate", str(name)])
        assert leaving.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "r.py", "--timeline", "x"), "--timeline needs --rollouts"),
        (("plan", "r.py", "--ranks", "0"), "--ranks needs --rehearse"),
        (("evaluate", "r.py", "--rate", "x", "--suite", "gsm8k"), "leave --suite, --problems and --training out"),
        (("evaluate", "r.py", "--rate", "x", "--training", "y"), "leave --suite, --problems and --training out"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2 and says in capsys.readouterr().err


def test_a_launch_option_after_the_command_is_told_where_it_stands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--processes", "2", "recipe.py:run"])
    assert ended.value.code == 2
    assert "--processes stands before the command: oreal --processes ... train" in capsys.readouterr().err

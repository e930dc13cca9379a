"""`oreal verify`: order and fields of the output, lines that cannot be graded, summary, errors."""

import argparse
import json
from pathlib import Path

import pytest

from oreal_megatron.cli import verify
from oreal_megatron.config import ConfigError


@pytest.fixture
def oreal_verify(tmp_path, capsys):
    """Return a function that runs the command on lines (or a path): (exit code, output rows, words printed)."""

    def call(lines, *options, source=None):
        source = source or tmp_path / "in.jsonl"
        if lines is not None:
            source.write_bytes(
                b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
            )
        out = tmp_path / "out.jsonl"
        parser = argparse.ArgumentParser()
        verify.add_arguments(parser)
        code = verify.run(parser.parse_args([str(source), str(out), *options]))
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        captured = capsys.readouterr()
        assert max(map(len, captured.out.splitlines())) <= 80
        return code, rows, " ".join((captured.out + captured.err).split())

    return call


def test_order_and_fields_stay(oreal_verify):
    lines = [{"id": n, "gold": str(n), "pred": f"\\frac{{{2 * n}}}{{2}}", "note": "ü"} for n in range(300)]
    code, rows, printed = oreal_verify(lines, "--workers", "2")
    assert code == 0 and [row["id"] for row in rows] == list(range(300)) and rows[7]["note"] == "ü"
    assert {row["verdict"] for row in rows} == {"correct"} and rows[5]["method"] == "exact"
    assert rows[5]["extracted"] == "\\frac{10}{2}" and rows[5]["seconds"] > 0
    assert "300 answers: 300 correct, 0 incorrect, 0 unknown" in printed and "median" in printed and "p99" in printed


def test_pred_is_read_as_a_file_response_as_the_policy(oreal_verify):
    lines = [
        {"gold": "5", "pred": "The answer is 5"}, {"gold": "5", "response": "The answer is 5"},
        {"gold": "5", "response": "\\boxed{5}"}, {"gold": "5", "response": "\\boxed{5}", "finished": False},
    ]  # fmt: skip
    _, rows, _ = oreal_verify(lines)
    assert [row["verdict"] for row in rows] == ["correct", "incorrect", "correct", "incorrect"]
    assert [row["method"] for row in rows][1:] == ["no answer", "exact", "truncated"]


def test_a_line_that_cannot_be_graded_is_reported_and_unknown(oreal_verify):
    lines = [
        {"gold": "1", "pred": "1"},
        b"{not json",
        b"[1]",
        {"gold": "1", "id": 9},
        b"\xff\xfe",
        {"gold": "2", "pred": "2"},
    ]
    code, rows, printed = oreal_verify(lines)
    assert code == 2 and [row["verdict"] for row in rows] == [
        "correct",
        "unknown",
        "unknown",
        "unknown",
        "unknown",
        "correct",
    ]
    assert all(f"line {number} " in printed for number in (2, 3, 4, 5))
    assert (
        "4 of 6 lines could not be graded" in printed
        and rows[3]["id"] == 9
        and "line 4 needs" in rows[3]["error"]
        and "4 unknown (unknown 66.67%)" in printed
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"gold": NaN, "pred": "nan"}', "`gold` is nan"),
        (b'{"gold": "1", "pred": Infinity}', "`pred` is inf"),
        (b'{"gold": "1\\ud800", "pred": "1"}', "`gold` holds half of a character"),
        (b'{"gold": "1", "response": "\\udc00 \\\\boxed{1}"}', "`response` holds half of a character"),
        (b'{"gold": "1", "pred": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"gold": "1", "pred": "1", "label": "perhaps"}', "`label` is 'perhaps'"),
        (b'{"gold": "1", "pred": "1", "label": [1]}', "`label` is [1]"),
    ],
)
def test_values_that_are_no_text_are_named_with_their_line(oreal_verify, line, says):
    code, rows, printed = oreal_verify([{"gold": "1", "pred": "1"}, line])
    assert code == 2 and [row["verdict"] for row in rows] == ["correct", "unknown"]
    assert "line 2" in printed and says in printed


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("true", "false"), ("True", "FALSE"), (1.0, 0.0), (True, False)])
def test_labels_may_be_written_as_text(oreal_verify, yes, no):
    lines = [{"gold": "1", "pred": "1", "label": yes}, {"gold": "1", "pred": "2", "label": no}]
    code, _, printed = oreal_verify(lines)
    assert code == 0 and "pairs 2, accuracy 100.00%, false accepts 0, false rejects 0" in printed


def test_labels_give_accuracy_by_kind_and_conventions_stand_apart(oreal_verify):
    lines = [
        {"gold": "1", "pred": "1", "label": 1, "kind": "a"}, {"gold": "1", "pred": "2", "label": 1, "kind": "a"},
        {"gold": "1", "pred": "1", "label": 0, "kind": "b"}, {"gold": "1", "pred": "2", "label": 0, "kind": "b"},
        {"gold": "1", "pred": "2", "label": 1, "kind": "convention:x"},
    ]  # fmt: skip
    _, _, printed = oreal_verify(lines)
    assert "kinds other than convention: pairs 4, accuracy 50.00%, false accepts 1, false rejects 1" in printed
    assert all(row in printed for row in ("a 2 50.00% 0 1", "b 2 50.00% 1 0", "convention:x 1 0.00% 0 1"))


def test_an_empty_file_is_valid(oreal_verify):
    code, rows, printed = oreal_verify([])
    assert code == 0 and rows == [] and "0 answers" in printed


def test_bad_arguments_are_refused_before_anything_starts(oreal_verify, tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        oreal_verify(None, source=tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="^verify.workers is 0; expected 1 to 1024"):
        oreal_verify([{"gold": "1", "pred": "1"}], "--workers", "0")
    for words, says in (
        (("--workers", "100000"), "verify.workers is 100000; expected 1 to 1024"),
        (("--timeout", "nan"), "timeout_s is nan; expected a finite number"),
        (("--judge", "localhost:8000"), "urls holds 'localhost:8000'; expected http://"),
        (("--judge", "http://"), "urls holds 'http://'"),
        (("--judge", "http://h:1", "--judge-cache", str(tmp_path)), "the judge's cache .* cannot be written"),
        (("--judge", "http://h:1", "--judge-cache", str(tmp_path / "in.jsonl")), "are one file"),
        (("--judge", "http://h:1", "--judge-cache", str(tmp_path / "out.jsonl")), "are one file"),
        (("--judge", "http://h:1", "--judge-cache", "/proc/x/y"), "the judge's cache /proc/x/y cannot be"),
    ):
        with pytest.raises(ConfigError, match=says):
            oreal_verify([{"gold": "1", "pred": "1"}], *words)
        assert not (tmp_path / "out.jsonl").exists() or "/proc" in words[-1]
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        run_on(tmp_path / "in.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another"):
        run_on(tmp_path / "in.jsonl", Path("/proc/out.jsonl"))
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is the input"):
        oreal_verify(None, source=tmp_path / "out.jsonl")


def run_on(source, output):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([str(source), str(output)]))


def test_several_processes_are_refused_before_the_output_is_touched(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"gold": "1", "pred": "1"}')
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="verify runs in one process; .*--workers"):
        run_on(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_judge_decides_what_the_rules_cannot(oreal_verify, judge_server):
    line = {"gold": "\\text{two lines}", "pred": "\\text{a pair of lines}", "question": "What?"}
    _, rows, _ = oreal_verify([line], "--judge", judge_server("CORRECT").url)
    assert (rows[0]["verdict"], rows[0]["method"]) == ("correct", "judge")

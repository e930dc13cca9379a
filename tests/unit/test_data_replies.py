"""`oreal data merge` and `oreal data skills`: chains and skills by a language model, whatever request fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oreal_megatron.cli.main import main
from oreal_megatron.config import ConfigError, JudgeConfig
from oreal_megatron.data import merge_attempts, replies, skills
from oreal_megatron.runtime import chat_client
from oreal_megatron.runtime.chat_client import Reply


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollout(question: str, response: str, verdict: str = "correct", **more) -> dict:
    row = {"question": question, "response": response, "verdict": verdict, "finished": True, "gold_answer": "3"}
    return row | more


ROLLOUTS = [
    *(rollout("p", f"wrong {number}", "incorrect") for number in range(3)),
    rollout("p", "right"),
    rollout("p", "also right"),
    rollout("q", "right alone"),
    rollout("hopeless", "wrong", "incorrect"),
    rollout("hopeless", "cut off", finished=False),
    rollout("hopeless", "again and again", penalty="repetition"),
    rollout("doubtful", "?", "unknown"),
    rollout("badly merged", "right"),
]


class FakeModel:
    """A model whose replies are functions of the chat, and whose n-th requests fail where `failing` says so."""

    def __init__(self, failing: list[bool]):
        self.failing, self.sent = failing, Counter()

    def submit(self, chat: chat_client.Chat) -> Future[Reply]:
        future: Future[Reply] = Future()
        if self.failing and self.failing.pop(0):
            future.set_result(Reply("", "host", "server host: HTTP status 500"))
            return future
        text = chat[-1]["content"]
        self.sent[text] += 1
        answer = 4 if "badly merged" in text else 3
        is_merge = chat[0]["content"] == merge_attempts.MERGE
        future.set_result(
            Reply(f"<think>so</think>{text} \\boxed{{{answer}}}" if is_merge else f"review of {text}", "host")
        )
        return future


def merge(
    tmp_path: Path, name: str, model: FakeModel, lines: list[dict], attempts: int = 3
) -> tuple[str, Counter[str]]:
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / name
    with replies.Replies(out, model, "model") as stored:
        try:
            counts = merge_attempts.write_chains(
                [source], out, stored, lambda gold, text: f"boxed{{{gold}}}" in text, attempts, threads=1
            )
        except ConfigError:
            return "", Counter()
    return "\n".join(sorted(out.read_text().splitlines())), counts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.permutations(ROLLOUTS), st.lists(st.booleans(), max_size=12), st.integers(2, 4))
def test_failed_requests_are_repeated_and_no_other(tmp_path, lines, failing, attempts):
    for file in tmp_path.iterdir():
        file.unlink()
    steady = FakeModel([])
    expected, counts = merge(tmp_path, "steady.jsonl", steady, ROLLOUTS, attempts)
    assert counts == {"": 2, merge_attempts.NO_CORRECT: 2, merge_attempts.INCORRECT: 1}
    model = FakeModel(list(failing))
    for _ in failing:  # each start uses up at least one failure, or has all replies
        _, counts = merge(tmp_path, "out.jsonl", model, lines, attempts)
        assert not counts or counts.total() == 5
    merged, counts = merge(tmp_path, "out.jsonl", model, lines, attempts)
    assert merged == expected and model.sent == steady.sent and counts[replies.NO_REPLY] == 0
    (chain,) = (line["response"] for line in map(json.loads, merged.splitlines()) if line["question"] == "p")
    assert chain.count("wrong ") == 2 * (attempts - 1), "each with its critique, which quotes it"
    assert chain.rindex("right") > chain.rindex("wrong ") and "<think>" not in chain


def test_the_replies_of_another_model_are_not_used(tmp_path):
    model = FakeModel([])
    merge(tmp_path, "out.jsonl", model, ROLLOUTS)
    with replies.Replies(tmp_path / "out.jsonl", model, "another") as stored:
        stored.text(merge_attempts.critique_chat("q", "right alone", "correct"))
    assert model.sent.most_common(1)[0][1] == 2


def test_a_file_of_replies_that_a_crash_cut_short_continues(tmp_path):
    model = FakeModel([])
    expected, _ = merge(tmp_path, "out.jsonl", model, ROLLOUTS)
    file = tmp_path / f"out.jsonl{replies.SUFFIX}"
    file.write_text(file.read_text()[:-20])
    assert merge(tmp_path, "out.jsonl", model, ROLLOUTS)[0] == expected
    assert sorted(model.sent.values())[-2:] == [1, 2], "only the last reply was requested again"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "BACK_OFF_S", (0.01, 0.02))
    monkeypatch.setattr(chat_client, "PAUSE_S", (0.1, 0.2))
    monkeypatch.setattr(replies, "ALL_DOWN_WAIT_S", 0.5)


def test_merge_over_http(judge_server, quick, tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", ROLLOUTS[2:4]), tmp_path / "out.jsonl"
    server = judge_server("say=The sum is wrong.", "say=I checked it.", "overlong=I try", "400")
    arguments = ["data", "merge", source, str(out), "--concurrency", "1", "--model", "m", "--server"]
    assert main([*arguments, server.url]) == 2 and not out.exists()
    assert replies.CUT_OFF in capsys.readouterr().err
    critiques = server.stop()[:2]
    server = judge_server("400", "say=<think>hm</think>I try, no: \\boxed{3.0}")
    longer = [*arguments, server.url, "--max-tokens", "9999"]
    assert main(longer) == 2 and replies.NO_REPLY in capsys.readouterr().err
    assert main(longer) == 0
    assert "1 of 1 problems are in the output" in capsys.readouterr().out
    assert read(out) == [{"question": "p", "response": "I try, no: \\boxed{3.0}"}]
    chats = server.stop()
    assert chats[0] == chats[1] == critiques[0] and "incorrect" in critiques[0] and "wrong 2" in critiques[0]
    assert main([*arguments, "http://127.0.0.1:1", "--max-tokens", "9999"]) == 0, "all replies are stored"


def test_servers_that_are_all_down_end_the_command(quick, tmp_path, free_port, capsys):
    source, out = write(tmp_path / "in.jsonl", ROLLOUTS), tmp_path / "out.jsonl"
    assert main(["data", "merge", source, str(out), "--server", f"http://127.0.0.1:{free_port}"]) == 3
    assert "bring one up and start the command again" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("turn", ["pending", "not begun", "later"])
def test_a_closed_client_settles_every_request(free_port, turn):
    service = chat_client.Service("server", "start again", replies.PROBE, 9)
    client = chat_client.ChatClient(JudgeConfig(urls=(f"http://127.0.0.1:{free_port}",)), service)
    futures = [client.submit(replies.PROBE) for _ in range(3 if turn == "pending" else 0)]
    if turn == "not begun":  # the loop takes up these requests and the end of the client in one turn
        is_queued = threading.Event()
        client._loop.call_soon_threadsafe(is_queued.wait)
        futures += [client.submit(replies.PROBE) for _ in range(3)]
        threading.Timer(0.2, is_queued.set).start()
    client.close()
    futures += [client.submit(replies.PROBE) for _ in range(3 if turn == "later" else 0)]
    assert len(wait(futures, timeout=10).done) == len(futures) == 3 and all(future.cancelled() for future in futures)
    client.close()


def test_a_request_that_loses_its_cancellation_is_cancelled_again(free_port):
    """Python 3.11 loses one in asyncio.wait_for when the reply comes at the same moment."""

    has_begun = threading.Event()

    async def lose_one_cancellation() -> None:
        has_begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    service = chat_client.Service("server", "start again", replies.PROBE, 9)
    client = chat_client.ChatClient(JudgeConfig(urls=(f"http://127.0.0.1:{free_port}",)), service)
    future = client._start(lose_one_cancellation)
    assert has_begun.wait(20)
    closing = threading.Thread(target=client.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and future.cancelled()


PROBLEMS = [
    {"question": "1+1?", "gold_answer": "2"},
    {"question": "2+2?", "gold_answer": "4", "skill": "Sums"},
    {"question": "no question", "question_": 1} | {"question": ""},
    {"question": "3*3?", "gold_answer": "9"},
    {"question": "4*4?", "gold_answer": "16"},
]


def test_skills_over_http(judge_server, quick, tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", PROBLEMS), tmp_path / "out.jsonl"
    server = judge_server('say="Integer addition."', "400", "say=" + "It tests many things. " * 9)
    arguments = ["data", "skills", source, str(out), "--concurrency", "1", "--model", "m", "--server", server.url]
    assert main(arguments) == 0
    assert [(line["question"], line["skill"]) for line in read(out)] == [("1+1?", "integer addition"), ("2+2?", "Sums")]
    printed = capsys.readouterr().out
    assert all(f"1 {reason}" in printed for reason in (skills.NO_PROBLEM, replies.NO_REPLY, skills.NO_SKILL))
    assert server.stop() == ["1+1?", "3*3?", "4*4?"], "a line with a skill is not sent"


def test_a_file_whose_lines_all_stay_without_a_skill_is_bad_input(judge_server, quick, tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", PROBLEMS[2:4]), tmp_path / "out.jsonl"
    server = judge_server("say=" + "It tests many things. " * 9)
    assert main(["data", "skills", source, str(out), "--concurrency", "1", "--server", server.url]) == 2
    said = capsys.readouterr().err
    assert all(f"1 {reason}" in said for reason in (skills.NO_PROBLEM, skills.NO_SKILL)) and "{" not in said
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_only_named_skills_are_accepted(judge_server, quick, tmp_path, capsys):
    source, out, names = write(tmp_path / "in.jsonl", PROBLEMS[3:]), tmp_path / "out.jsonl", tmp_path / "names.txt"
    names.write_text("Products\n\nSums\n")
    server = judge_server("say=**products**", "say=powers")
    arguments = ["data", "skills", source, str(out), "--concurrency", "1", "--server", server.url, "--among"]
    assert main([*arguments, str(names)]) == 0
    assert read(out) == [PROBLEMS[3] | {"skill": "Products"}] and f"1 {skills.NO_SKILL}" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "none.txt")]) == 2 and "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("Vieta's formulas", "vieta's formulas"),
        ('**"Counting with inclusion and exclusion."**', "counting with inclusion and exclusion"),
        ("The answer is $\\tan A$", ""),  # replies of SmolLM2-135M to problems of MATH-500
        ("x + 1 = 3", ""),
        ("196 is a positive whole-number divisor of 196, which is 1.", ""),
        ("Algebra\nThis problem", ""),
        (" '' ", ""),
    ],
)
def test_a_sentence_or_a_formula_is_no_name_of_a_skill(reply, name):
    assert skills.free_name(reply) == name


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("**Sums**", "Sums"),
        ("The core skill is sums of squares.", "Sums of squares"),  # the longer name holds the shorter
        ("It tests sums.", "Sums"),
        ("Sums and products.", ""),
        ("Summation", ""),
        ("It consumes sumsets", ""),
        ("", ""),
    ],
)
def test_the_only_allowed_name_in_a_reply_is_its_skill(reply, name):
    allowed = {skills.normalise(known): known for known in ("Products", "Sums", "Sums of squares")}
    assert skills.named_skill(reply, allowed) == name


def annotated(count: int) -> list[dict]:
    return [{"question": f"{skill} {number}", "skill": skill} for skill in "abc" for number in range(count)]


def write_run(folder: Path, steps: list[list[dict]]) -> str:
    (folder / "rollouts").mkdir(parents=True)
    for number, rows in enumerate(steps):
        write(folder / f"rollouts/step_{number:06d}.jsonl", rows)
    return str(folder)


RUN = [  # of question "a 0": failed twice; "a 1": once and then unknown; "b 0": twice, but a rollout was correct
    [rollout("a 0", "x", "incorrect"), rollout("a 1", "x", "incorrect"), rollout("b 0", "x", "incorrect")],
    [rollout("a 0", "x", "incorrect"), rollout("a 0", "y", "unknown"), rollout("a 1", "x", "unknown")],
    [rollout("b 0", "x", "incorrect"), rollout("b 0", "y", "correct"), rollout("elsewhere", "x", "incorrect")],
    [rollout("elsewhere", "x", "incorrect")],
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.permutations(annotated(6)), st.integers(1, 8), st.integers(0, 3))
def test_problems_of_failed_skills_are_drawn(tmp_path, lines, per_failure, seed):
    for file in tmp_path.glob("*.jsonl*"):
        file.unlink()
    run = tmp_path / "run"
    failed = skills.failed_questions(write_run(run, RUN) if not run.exists() else str(run), 2)
    assert failed == {"a0", "elsewhere"}
    drawn = []
    for variant in (lines, annotated(6)):
        out = tmp_path / "out.jsonl"
        counts = skills.draw(write(tmp_path / "in.jsonl", variant), out, failed, per_failure, seed)
        drawn.append(sorted(line["question"] for line in read(out)))
    assert drawn[0] == drawn[1], "independent of the order of the lines"
    assert counts == (2, 1, 1, min(per_failure, 5)) == (2, 1, 1, len(drawn[0]))
    assert all(question.startswith("a ") for question in drawn[0]) and "a 0" not in drawn[0]


def test_a_draw_by_the_command(tmp_path, capsys):
    run, source, out = (
        write_run(tmp_path / "run", RUN),
        write(tmp_path / "in.jsonl", annotated(3)),
        tmp_path / "out.jsonl",
    )
    assert main(["data", "skills", source, str(out), "--failed-in", run, "--per-failure", "1"]) == 0
    assert len(read(out)) == 1 and "2 questions have no correct rollout in 2 steps or more" in capsys.readouterr().out
    assert main(["data", "skills", source, str(out), "--failed-in", run, "--steps", "5"]) == 2
    assert "nothing was drawn" in capsys.readouterr().err
    bare = write(tmp_path / "bare.jsonl", PROBLEMS[:1])
    assert main(["data", "skills", bare, str(out), "--failed-in", run]) == 2
    assert "line 1 has no skill; annotate the file first" in capsys.readouterr().err

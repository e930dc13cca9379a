"""`oreal doctor` asks every judge host one question."""

from __future__ import annotations

from oreal_megatron.config import JudgeConfig
from oreal_megatron.doctor import checks


def test_every_judge_host_is_asked_and_a_bad_one_is_named(judge_server):
    urls = (judge_server("CORRECT").url, judge_server("say=WRONG").url, "http://127.0.0.1:9")
    found = checks.judges(JudgeConfig(urls=urls))
    assert [finding.state for finding in found] == ["ok", "warning", "warning"]
    assert [finding.name for finding in found] == [f"judge {url}" for url in urls]
    assert "2.0 equals 2" in found[1].fix and found[2].detail.startswith("down: ConnectError")
    assert [finding.state for finding in checks.judges(JudgeConfig(urls=urls[2:]))] == ["FAILED"]

"""LLM judge over an OpenAI-compatible API (runtime/chat_client.py), with cached verdicts.

When all hosts are down for `all_down_wait_s`, requests fail with ServersDown: the run stops, can be resumed, and never
trains on guesses.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import NamedTuple

from oreal_megatron import config
from oreal_megatron.records import Outcome
from oreal_megatron.runtime import chat_client
from oreal_megatron.runtime.chat_client import ChatClient, Service
from oreal_megatron.verify import judge_prompt, verdict_cache
from oreal_megatron.verify.verdict_cache import VerdictCache, cache_key

MAX_TOKENS = 256  # the verdict is one word, but some judges think aloud first
PROBE = ("What is 1 + 1?", "2", "2")  # question, gold answer and answer of the chat that a paused host is probed with
SERVICE = Service(
    "judge",
    "resume the run, or raise verify.judge.all_down_wait_s (now {limit_s:g} s)",
    judge_prompt.messages(*PROBE, max(map(len, PROBE))),
    MAX_TOKENS,
)


def check_settings(settings: config.JudgeConfig) -> None:
    """Raise ConfigError for servers and a cache that cannot be used, before anything starts."""
    if settings.urls:
        chat_client.refuse_secrets(settings.urls, SERVICE.noun)
        verdict_cache.check_file(settings.cache)


class Judgement(NamedTuple):
    """Outcome of one request for a verdict; `reason`: why it is UNKNOWN."""

    outcome: Outcome
    seconds: float
    reason: str = ""


class JudgeClient(ChatClient):
    """Client of one or more judge servers, for any thread. `judge` never blocks."""

    def __init__(self, config: config.JudgeConfig) -> None:
        self.cache = VerdictCache(config.cache)
        self._pending: dict[str, asyncio.Future[tuple[str, str]]] = {}
        super().__init__(config, SERVICE)

    # -- for every thread ----------------------------------------------------------------------------------------
    def judge(self, question: str, gold: str, answer: str) -> Future[Judgement]:
        """Return a future judgement. UNKNOWN: no reply, or one without a verdict. It fails with ServersDown."""
        return self._start(lambda: self._judgement(question, gold, answer))

    def accepts(self, gold: str, answer: str) -> bool:
        """Return whether the judge may see an answer: not if it is too long, or addresses its reader."""
        short = len(answer) <= max(self.config.max_answer_chars, 2 * len(gold))
        return short and (judge_prompt.is_injection(gold) or not judge_prompt.is_injection(answer))

    # -- on the loop ---------------------------------------------------------------------------------------------
    async def _judgement(self, question: str, gold: str, answer: str) -> Judgement:
        start = time.monotonic()
        outcome, reason = await self._verdict(question, gold, answer)
        return Judgement(Outcome(outcome), time.monotonic() - start, reason)

    async def _verdict(self, question: str, gold: str, answer: str) -> tuple[str, str]:
        """Return the outcome of an answer that is not shown, of the cache, or of one request per different answer.

        With the reason where it is unknown.
        """
        if not self.accepts(gold, answer):
            return "incorrect", ""
        judge = self.config.model or " ".join(host.url for host in self.hosts)
        key = cache_key(question, gold, answer, judge, judge_prompt.PROMPT_VERSION)
        if (known := self.cache.get(key)) is not None:
            return known, ""
        if key not in self._pending:
            self._pending[key] = asyncio.ensure_future(self._request_verdict(question, gold, answer))
            self._pending[key].add_done_callback(lambda _: self._pending.pop(key))
        outcome, reason = await self._pending[key]
        self.cache.put(key, outcome)
        return outcome, reason

    async def _request_verdict(self, question: str, gold: str, answer: str) -> tuple[str, str]:
        """Return the outcome of one reply, "unknown" without one, and why it is unknown."""
        reply = await self.complete(
            judge_prompt.messages(question, gold, answer, max(self.config.max_answer_chars, len(answer)))
        )
        if reply.reason:
            return "unknown", reply.reason
        outcome = judge_prompt.parse(reply.text)
        unclear = f"judge {reply.host}: the reply holds no verdict ({reply.text.strip()[:60]!r})"
        return outcome, unclear if outcome == "unknown" else ""

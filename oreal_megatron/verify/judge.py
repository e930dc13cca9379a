"""LLM judge over an OpenAI-compatible API. The only module of the package that speaks HTTP.

A thread of its own runs an asyncio loop: bounded concurrency, time-outs, retries with jittered back-off, one circuit
breaker per host, cached verdicts. A host that fails pauses for a growing time and is then probed with a short chat: one
that lists its models but completes nothing is down. When all hosts are down, requests wait up to `all_down_wait_s` with
a warning now and then, and fail with JudgesDown: the run stops, can be resumed, and never trains on guesses.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from oreal_megatron import config
from oreal_megatron.records import Outcome
from oreal_megatron.verify import judge_prompt, verdict_cache
from oreal_megatron.verify.futures import cancel, fail, settle
from oreal_megatron.verify.verdict_cache import VerdictCache, cache_key

log = logging.getLogger(__name__)
FAILURES_TO_OPEN = 3  # in a row, before a host pauses
PAUSE_S = (1.0, 30.0)  # first and longest pause of a host; each is twice the one before
BACK_OFF_S = (0.5, 10.0)  # first and longest time before a retry; each is three times the one before
WARN_EVERY_S = 10.0  # while every host is down
MAX_REPLY_BYTES = 1_000_000
MAX_TOKENS = 256  # the verdict is one word, but some judges think aloud first
API_KEY = "OREAL_JUDGE_API_KEY"  # name of the environment variable; its value is never written to a file or log
_REFUSED = (400, 413, 422)  # status codes for which the request is at fault, not the host
_NOT_DOWN = (429, *_REFUSED)  # a busy host is not down
PROBE = ("What is 1 + 1?", "2", "2")  # question, gold answer and answer of the chat that a paused host is probed with


def refuse_secrets(urls: Sequence[str]) -> None:
    """Raise ConfigError for a URL with a password or a query: URLs are written into config.json and logs."""
    for url in map(urlsplit, urls):
        if url.username or url.password or url.query:
            raise config.ConfigError(
                f"the URL of judge {url.hostname} holds a user, a password or a query, which run folders and logs "
                f"would show; give the bare URL, and the key in the environment as {API_KEY}"
            )


def check_settings(settings: config.JudgeConfig) -> None:
    """Raise ConfigError for servers and a cache that cannot be used, before anything starts."""
    if settings.urls:
        refuse_secrets(settings.urls)
        verdict_cache.check_file(settings.cache)


class Judgement(NamedTuple):
    """Outcome of one request for a verdict; `reason`: why it is UNKNOWN."""

    outcome: Outcome
    seconds: float
    reason: str = ""


class JudgesDown(RuntimeError):
    """No judge host replied within all_down_wait_s. The run stops and can be resumed when one is back."""


class _RequestFailed(Exception):
    """One request without a usable reply; the text is the reason."""

    def __init__(self, reason: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(slots=True)
class _Host:
    """One judge server and its circuit breaker: closed below FAILURES_TO_OPEN failures in a row."""

    url: str
    failures: int = 0  # in a row
    retry_at: float = 0.0  # monotonic time at which the pause ends
    probing: bool = False
    in_flight: int = 0
    model: str = ""
    last_error: str = ""

    @property
    def is_up(self) -> bool:
        """True while requests may go to the host."""
        return self.failures < FAILURES_TO_OPEN

    def record_failure(self, reason: str) -> None:
        """Count a failure; after FAILURES_TO_OPEN in a row the host pauses."""
        self.failures += 1
        self.last_error = reason
        if not self.is_up:
            first, longest = PAUSE_S
            pause_s = min(longest, first * 2.0 ** min(self.failures - FAILURES_TO_OPEN, 10))
            self.retry_at = time.monotonic() + pause_s * random.uniform(0.75, 1.25)


class JudgeClient:
    """Client of one or more judge servers, for any thread. `submit` never blocks."""

    def __init__(self, config: config.JudgeConfig) -> None:
        if not config.urls:
            raise ValueError("a judge needs at least one URL, got none; set verify.judge.urls")
        refuse_secrets(config.urls)
        self.config = config
        self.cache = VerdictCache(config.cache)
        self.hosts = [_Host(url.rstrip("/").removesuffix("/v1")) for url in config.urls]
        self.requests = 0  # sent so far, without probes
        self._pending: dict[str, asyncio.Future[tuple[str, str]]] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._down_since: float | None = None
        self._warned_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify-judge", daemon=True)
        self._thread.start()
        self._ready.wait()

    # -- for every thread ----------------------------------------------------------------------------------------
    def submit(self, question: str, gold: str, answer: str) -> Future[Judgement]:
        """Return a future judgement. UNKNOWN: no reply, or one without a verdict. It fails with JudgesDown."""
        future: Future[Judgement] = Future()
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._answer(future, question, gold, answer)))
        return future

    def accepts(self, gold: str, answer: str) -> bool:
        """Return whether the judge may see an answer: not if it is too long, or addresses its reader."""
        short = len(answer) <= max(self.config.max_answer_chars, 2 * len(gold))
        return short and (judge_prompt.is_injection(gold) or not judge_prompt.is_injection(answer))

    def health(self) -> dict[str, str]:
        """Map the URL of each host to "up", or to the error for which it pauses."""
        return {host.url: "up" if host.is_up else f"down: {host.last_error}" for host in self.hosts}

    def close(self) -> None:
        """Close the connections; pending verdicts are cancelled."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # -- on the loop ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        timeout = httpx.Timeout(self.config.read_timeout_s, connect=self.config.connect_timeout_s, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency)
        # trust_env=False: a judge is an address of the cluster, not one behind the environment's proxy
        key = os.environ.get(API_KEY, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, headers=headers)
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, future: Future[Judgement], question: str, gold: str, answer: str) -> None:
        start = time.monotonic()
        try:
            outcome, reason = await self._verdict(question, gold, answer)
            judgement = Judgement(Outcome(outcome), time.monotonic() - start, reason)
        except asyncio.CancelledError:
            cancel(future)
            raise
        except Exception as error:  # raised where the verdict is waited for
            fail(future, error)
        else:
            settle(future, judgement)

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
        """Try hosts until one replies. After the retries: "unknown" if a host is alive, else another round."""
        chat = judge_prompt.messages(question, gold, answer, max(self.config.max_answer_chars, len(answer)))
        async with self._slots:
            while True:
                for attempt in range(self.config.retries + 1):
                    host = await self._host()
                    self.requests += 1
                    try:
                        reply = await self._request(host, chat)
                    except _RequestFailed as failure:
                        reason = f"judge {host.url}: {failure}"
                        if failure.status in _REFUSED:
                            log.warning("judge %s refused a request: %s", host.url, failure)
                            return "unknown", reason
                        await asyncio.sleep(self._back_off(attempt, failure))
                        continue
                    outcome = judge_prompt.parse(reply)
                    unclear = f"judge {host.url}: the reply holds no verdict ({reply.strip()[:60]!r})"
                    return outcome, unclear if outcome == "unknown" else ""
                if await self._any_alive():
                    return "unknown", reason

    @staticmethod
    def _back_off(attempt: int, failure: _RequestFailed) -> float:
        first, longest = BACK_OFF_S
        back_off_s = min(longest, first * 3.0**attempt) * random.uniform(0.5, 1.0)
        return max(back_off_s, min(failure.retry_after_s, PAUSE_S[1]))

    async def _any_alive(self) -> bool:
        if any(host.failures == 0 for host in self.hosts):
            return True
        return any(await asyncio.gather(*(self._probe(host) for host in self.hosts)))

    async def _host(self) -> _Host:
        """Return the host with the fewest requests in flight among those that are up; wait while there is none."""
        while not (up := [host for host in self.hosts if host.is_up]):
            now = time.monotonic()
            for host in self.hosts:
                if now >= host.retry_at and not host.probing:
                    self._spawn(self._probe(host))
            self._warn_or_raise(now)
            await asyncio.sleep(0.1)
        self._down_since = None
        for host in self.hosts:
            if not host.is_up and not host.probing and time.monotonic() >= host.retry_at:
                self._spawn(self._probe(host))
        return min(up, key=lambda host: (host.in_flight, host.failures, random.random()))

    def _warn_or_raise(self, now: float) -> None:
        """Warn that every host is down, every WARN_EVERY_S; raise JudgesDown after all_down_wait_s."""
        self._down_since = self._down_since or now
        down_s, limit = now - self._down_since, self.config.all_down_wait_s
        errors = "; ".join(f"{host.url}: {host.last_error}" for host in self.hosts)
        if down_s >= limit:
            raise JudgesDown(
                f"no judge host replied for {down_s:.0f} s ({errors}); bring one up and resume the run, "
                f"or raise verify.judge.all_down_wait_s (now {limit:g} s)"
            )
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning("all judge hosts are down for %.0f s, waiting up to %.0f s: %s", down_s, limit, errors)

    async def _probe(self, host: _Host) -> bool:
        """Return whether a host completes a short chat again, or is only busy; close its circuit breaker if so."""
        host.probing = True
        try:
            await self._request(host, judge_prompt.messages(*PROBE, max(map(len, PROBE))))
        except _RequestFailed as failure:
            if failure.status not in _NOT_DOWN:
                return False
            host.failures = 0
        finally:
            host.probing = False
        return True

    async def _request(self, host: _Host, chat: list[dict[str, str]]) -> str:
        """Return the text of one reply. Every fault of a server or the network becomes _RequestFailed."""
        host.in_flight += 1
        try:
            # the exchange has a time-out too: a server that sends a byte now and then never meets the read time-out
            limit = self.config.connect_timeout_s + self.config.read_timeout_s
            text = await asyncio.wait_for(self._exchange(host, chat), limit)
        except TimeoutError:
            failure = _RequestFailed("no complete reply in time")
        except httpx.HTTPError as error:
            failure = _RequestFailed(f"{type(error).__name__} {error}".strip())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            failure = _RequestFailed(f"the reply does not follow the OpenAI API ({type(error).__name__})")
        except _RequestFailed as error:
            failure = error
        else:
            host.failures = 0
            return text
        finally:
            host.in_flight -= 1
        if failure.status not in _NOT_DOWN:
            host.record_failure(str(failure))
        raise failure

    async def _exchange(self, host: _Host, chat: list[dict[str, str]]) -> str:
        if not (self.config.model or host.model):
            host.model = (await self._json("GET", f"{host.url}/v1/models", None))["data"][0]["id"]
        body = {"model": self.config.model or host.model, "messages": chat, "temperature": 0, "max_tokens": MAX_TOKENS}
        reply = await self._json("POST", f"{host.url}/v1/chat/completions", body)
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("the reply has no text")
        return text

    async def _json(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async with self._client.stream(method, url, json=body) as response:
            if response.status_code != 200:
                after = response.headers.get("retry-after", "")
                raise _RequestFailed(
                    f"HTTP status {response.status_code}",
                    response.status_code,
                    float(after) if after.isdigit() else 0.0,
                )
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise _RequestFailed(f"the reply has more than {MAX_REPLY_BYTES} bytes")
        reply: dict[str, Any] = json.loads(content)
        return reply

"""The LLM judge over the OpenAI-compatible API: the one file that speaks HTTP.

Its own thread runs an asyncio loop: bounded concurrency, time-outs, retries with jittered back-off, one circuit
breaker per
host, verdicts cached. A host that fails is left alone for a growing while and then asked for its models; when all
are down,
requests wait up to `all_down_wait_s`, say so, and fail with JudgesDown: the run stops resumably and never trains on
guesses.
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
from urllib.parse import urlsplit

import httpx

from oreal_megatron import config
from oreal_megatron.records import Outcome
from oreal_megatron.verify import judge_prompt
from oreal_megatron.verify.futures import cancel, fail, settle
from oreal_megatron.verify.verdict_cache import VerdictCache, cache_key

log = logging.getLogger(__name__)
FAILURES_TO_OPEN = 3  # in a row, before a host is left alone
REST_S = (1.0, 30.0)  # how long it is left alone: first, and at most; doubled from one to the next
BACK_OFF_S = (0.5, 10.0)  # before a retry: first, and at most; tripled from one to the next
MESSAGE_EVERY_S = 10.0  # while every host is down
PROBE_S = 5.0  # for the list of models of a host that was left alone
MAX_REPLY_BYTES = 1_000_000
MAX_TOKENS = 256  # one word is asked for; some judges think aloud first
API_KEY = "OREAL_JUDGE_API_KEY"  # of the environment only: nothing of it is ever written down
_REFUSED = (400, 413, 422)  # this request is at fault, not the host


def refuse_secrets(urls: Sequence[str]) -> None:
    """URLs are written into config.json and logs, so no key may be in one."""
    for url in map(urlsplit, urls):
        if url.username or url.password or url.query:
            raise config.ConfigError(
                f"the URL of judge {url.hostname} holds a user, a password or a query, which run folders and logs "
                f"would show; give the bare URL, and the key in the environment as {API_KEY}"
            )


class JudgesDown(RuntimeError):
    """No judge host answered for the whole waiting time. Stop the run; it can be resumed when one is back."""


class _Failed(Exception):
    """One exchange that brought no reply; the text says why."""

    def __init__(self, why: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(slots=True)
class _Host:
    """One judge server and its circuit breaker: closed below FAILURES_TO_OPEN failures in a row."""

    url: str
    failures: int = 0  # in a row
    rests_until: float = 0.0  # monotonic time
    probing: bool = False
    under_way: int = 0
    model: str = ""
    last_error: str = ""

    @property
    def up(self) -> bool:
        return self.failures < FAILURES_TO_OPEN

    def failed(self, why: str) -> None:
        self.failures += 1
        self.last_error = why
        if not self.up:
            first, most = REST_S
            rest = min(most, first * 2.0 ** min(self.failures - FAILURES_TO_OPEN, 10))
            self.rests_until = time.monotonic() + rest * random.uniform(0.75, 1.25)


class JudgeClient:
    """Asks judges from any thread. `submit` never blocks."""

    def __init__(self, config: config.JudgeConfig) -> None:
        if not config.urls:
            raise ValueError("a judge needs at least one URL, got none; set verify.judge.urls")
        refuse_secrets(config.urls)
        self.config = config
        self.cache = VerdictCache(config.cache)
        self.hosts = [_Host(url.rstrip("/").removesuffix("/v1")) for url in config.urls]
        self.requests = 0  # sent so far
        self._flying: dict[str, asyncio.Future[str]] = {}
        self._tasks: set[asyncio.Task] = set()
        self._down_since: float | None = None
        self._said_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify-judge", daemon=True)
        self._thread.start()
        self._ready.wait()

    # -- for every thread ----------------------------------------------------------------------------------------
    def submit(self, question: str, gold: str, answer: str) -> Future[tuple[Outcome, float]]:
        """(outcome, seconds) to come; the future fails with JudgesDown. UNKNOWN: no reply, or one without a verdict."""
        future: Future[tuple[Outcome, float]] = Future()
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._answer(future, question, gold, answer)))
        return future

    def asks_about(self, gold: str, answer: str) -> bool:
        """Whether an answer is shown to the judge at all: not when it is too long to be one, or talks to its reader."""
        short = len(answer) <= max(self.config.max_answer_chars, 2 * len(gold))
        return short and (judge_prompt.is_injection(gold) or not judge_prompt.is_injection(answer))

    def health(self) -> dict[str, str]:
        """url -> "up", or why it is left alone."""
        return {host.url: "up" if host.up else f"down: {host.last_error}" for host in self.hosts}

    def close(self) -> None:
        """Drops the connections; verdicts still to come are cancelled."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # -- on the loop ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        timeout = httpx.Timeout(self.config.read_timeout_s, connect=self.config.connect_timeout_s, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency)
        # trust_env=False: a judge is an address of the cluster; a proxy of the environment has no part in it
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

    def _spawn(self, coroutine: Coroutine) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, future: Future, question: str, gold: str, answer: str) -> None:
        start = time.monotonic()
        try:
            outcome = await self._verdict(question, gold, answer)
        except asyncio.CancelledError:
            cancel(future)
            raise
        except Exception as error:  # it reaches whoever waits for the verdict
            fail(future, error)
        else:
            settle(future, (Outcome(outcome), time.monotonic() - start))

    async def _verdict(self, question: str, gold: str, answer: str) -> str:
        """Refusal, cache, a request for the same that is under way, else a request."""
        if not self.asks_about(gold, answer):
            return "incorrect"
        judge = self.config.model or " ".join(host.url for host in self.hosts)
        key = cache_key(question, gold, answer, judge, judge_prompt.PROMPT_VERSION)
        if (known := self.cache.get(key)) is not None:
            return known
        if key not in self._flying:
            self._flying[key] = asyncio.ensure_future(self._ask(question, gold, answer))
            self._flying[key].add_done_callback(lambda _: self._flying.pop(key))
        outcome = await self._flying[key]
        self.cache.put(key, outcome)
        return outcome

    async def _ask(self, question: str, gold: str, answer: str) -> str:
        """Tries hosts until one replies. After the retries UNKNOWN where a host lives, else another round when one
        is back."""
        chat = judge_prompt.messages(question, gold, answer, max(self.config.max_answer_chars, len(answer)))
        async with self._slots:
            while True:
                for attempt in range(self.config.retries + 1):
                    host = await self._host()
                    try:
                        return judge_prompt.parse(await self._request(host, chat))
                    except _Failed as failure:
                        if failure.status in _REFUSED:
                            log.warning("judge %s refused a request: %s", host.url, failure)
                            return "unknown"
                        await asyncio.sleep(self._back_off(attempt, failure))
                if await self._any_alive():
                    return "unknown"

    @staticmethod
    def _back_off(attempt: int, failure: _Failed) -> float:
        first, most = BACK_OFF_S
        return max(min(most, first * 3.0**attempt) * random.uniform(0.5, 1.0), min(failure.retry_after_s, REST_S[1]))

    async def _any_alive(self) -> bool:
        if any(host.failures == 0 for host in self.hosts):
            return True
        return any(await asyncio.gather(*(self._probe(host) for host in self.hosts)))

    async def _host(self) -> _Host:
        """The host with the fewest requests under way among those that are up; waits, and says so, while there is
        none."""
        while not (up := [host for host in self.hosts if host.up]):
            now = time.monotonic()
            for host in self.hosts:
                if now >= host.rests_until and not host.probing:
                    self._spawn(self._probe(host))
            self._complain(now)
            await asyncio.sleep(0.1)
        self._down_since = None
        for host in self.hosts:
            if not host.up and not host.probing and time.monotonic() >= host.rests_until:
                self._spawn(self._probe(host))
        return min(up, key=lambda host: (host.under_way, host.failures, random.random()))

    def _complain(self, now: float) -> None:
        """Says that every host is down, now and then, and raises JudgesDown when that has lasted too long."""
        self._down_since = self._down_since or now
        down_s, limit = now - self._down_since, self.config.all_down_wait_s
        why = "; ".join(f"{host.url}: {host.last_error}" for host in self.hosts)
        if down_s >= limit:
            raise JudgesDown(
                f"no judge host answered for {down_s:.0f} s ({why}); bring one up and resume the run, "
                f"or raise verify.judge.all_down_wait_s (now {limit:g} s)"
            )
        if now - self._said_at >= MESSAGE_EVERY_S:
            self._said_at = now
            log.warning("all judge hosts are down for %.0f s, waiting up to %.0f s: %s", down_s, limit, why)

    async def _probe(self, host: _Host) -> bool:
        """Whether a host that was left alone speaks HTTP again. Closes its breaker if so."""
        host.probing = True
        try:
            response = await asyncio.wait_for(self._client.get(f"{host.url}/v1/models"), PROBE_S)
            alive = response.status_code < 500 or response.status_code == 501  # a server without that page lives too
        except (httpx.HTTPError, TimeoutError):
            alive = False
        finally:
            host.probing = False
        if alive:
            host.failures = 0
        else:
            host.failed(host.last_error or "no reply to a probe")
        return alive

    async def _request(self, host: _Host, chat: list[dict[str, str]]) -> str:
        """The text of one reply. Everything a server or the network may do wrong becomes _Failed."""
        self.requests += 1
        host.under_way += 1
        try:
            # the whole exchange is timed as well: a server that sends a byte now and then never meets the read time-out
            limit = self.config.connect_timeout_s + self.config.read_timeout_s
            text = await asyncio.wait_for(self._exchange(host, chat), limit)
        except TimeoutError:
            failure = _Failed("no complete reply in time")
        except httpx.HTTPError as error:
            failure = _Failed(f"{type(error).__name__} {error}".strip())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            failure = _Failed(f"a reply that is not of the OpenAI API ({type(error).__name__})")
        except _Failed as error:
            failure = error
        else:
            host.failures = 0
            return text
        finally:
            host.under_way -= 1
        if failure.status not in (429, *_REFUSED):  # a busy host is no dead one
            host.failed(str(failure))
        raise failure

    async def _exchange(self, host: _Host, chat: list[dict[str, str]]) -> str:
        if not (self.config.model or host.model):
            host.model = (await self._json("GET", f"{host.url}/v1/models", None))["data"][0]["id"]
        body = {"model": self.config.model or host.model, "messages": chat, "temperature": 0, "max_tokens": MAX_TOKENS}
        reply = await self._json("POST", f"{host.url}/v1/chat/completions", body)
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("a reply without text")
        return text

    async def _json(self, method: str, url: str, body: dict | None) -> dict:
        async with self._client.stream(method, url, json=body) as response:
            if response.status_code != 200:
                after = response.headers.get("retry-after", "")
                raise _Failed(
                    f"HTTP status {response.status_code}",
                    response.status_code,
                    float(after) if after.isdigit() else 0.0,
                )
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise _Failed(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        return json.loads(content)

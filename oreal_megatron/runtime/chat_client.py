"""Client of language models behind the OpenAI chat API. The only module of the package that speaks HTTP.

A thread of its own runs an asyncio loop: bounded concurrency, time-outs, retries with jittered back-off, and one
circuit breaker per host. A host that fails pauses for a growing time and is then probed with a short chat: one that
lists its models but completes nothing is down. When all hosts are down, requests wait up to `all_down_wait_s` with a
warning now and then, and fail with ServersDown.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from oreal_megatron.config import ConfigError, JudgeConfig
from oreal_megatron.runtime.futures import cancel, fail, settle

log = logging.getLogger(__name__)
FAILURES_TO_OPEN = 3  # in a row, before a host pauses
PAUSE_S = (1.0, 30.0)  # first and longest pause of a host; each is twice the one before
BACK_OFF_S = (0.5, 10.0)  # first and longest time before a retry; each is three times the one before
WARN_EVERY_S = 10.0  # while every host is down
MAX_REPLY_BYTES = 1_000_000
API_KEY = "OREAL_JUDGE_API_KEY"  # name of the environment variable; its value is never written to a file or log
_REFUSED = (400, 413, 422)  # status codes for which the request is at fault, not the host
_NOT_DOWN = (429, *_REFUSED)  # a busy host is not down
Chat = list[dict[str, str]]
T = TypeVar("T")


def refuse_secrets(urls: Sequence[str], noun: str) -> None:
    """Raise ConfigError for a URL with a password or a query: URLs are written into config.json and logs."""
    for url in map(urlsplit, urls):
        if url.username or url.password or url.query:
            raise ConfigError(
                f"the URL of {noun} {url.hostname} holds a user, a password or a query, which run folders and logs "
                f"would show; give the bare URL, and the key in the environment as {API_KEY}"
            )


@dataclass(frozen=True)
class Service:
    """The use of the servers: a noun and an advice for messages, a chat for probes, the most tokens of a reply."""

    noun: str
    advice: str  # follows "bring one up and"; {limit_s} is all_down_wait_s
    probe: Chat
    max_tokens: int


class Reply(NamedTuple):
    """Result of one chat; `reason`: why there is no text."""

    text: str
    host: str
    reason: str = ""
    is_complete: bool = True  # False if the server cut the text off at its longest length


class ServersDown(RuntimeError):
    """No host replied within all_down_wait_s."""


class _RequestFailed(Exception):
    """One request without a usable reply; the text is the reason."""

    def __init__(self, reason: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(slots=True)
class _Host:
    """One server and its circuit breaker: closed below FAILURES_TO_OPEN failures in a row."""

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


class ChatClient:
    """Client of one or more servers, for any thread. `submit` never blocks."""

    def __init__(self, config: JudgeConfig, service: Service) -> None:
        if not config.urls:
            raise ValueError(f"a {service.noun} needs at least one URL, got none")
        refuse_secrets(config.urls, service.noun)
        self.config, self.service = config, service
        self.hosts = [_Host(url.rstrip("/").removesuffix("/v1")) for url in config.urls]
        self.requests = 0  # sent so far, without probes
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()  # of the queue of the loop: nothing may follow the request to stop
        self._is_closed = False
        self._down_since: float | None = None
        self._warned_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{service.noun} client", daemon=True)
        self._thread.start()
        self._ready.wait()

    # -- for every thread ----------------------------------------------------------------------------------------
    def submit(self, chat: Chat) -> Future[Reply]:
        """Return a future reply, without text where no request succeeded. It fails with ServersDown."""
        return self._start(lambda: self.complete(chat))

    def health(self) -> dict[str, str]:
        """Map the URL of each host to "up", or to the error for which it pauses."""
        return {host.url: "up" if host.is_up else f"down: {host.last_error}" for host in self.hosts}

    def close(self) -> None:
        """Close the connections; pending requests and later ones are cancelled."""
        with self._lock:
            if not self._is_closed:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._is_closed = True
        self._thread.join()

    def _start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Return the future result of a coroutine that runs on the loop."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                cancel(future)
            else:
                self._loop.call_soon_threadsafe(lambda: self._settle(future, self._spawn(work())))
        return future

    # -- on the loop ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        timeout = httpx.Timeout(self.config.read_timeout_s, connect=self.config.connect_timeout_s, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency)
        # trust_env=False: a server is an address of the cluster, not one behind the environment's proxy
        key = os.environ.get(API_KEY, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, headers=headers)
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        while self._tasks:  # again, because asyncio.wait_for of Python 3.11 loses a cancellation if its result is there
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(self._tasks, timeout=0.1))
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    def _settle(future: Future[T], task: asyncio.Task[T]) -> None:
        """Copy the end of a task to a future: a callback, because a task cancelled before it began runs no code."""

        def copy(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                cancel(future)
            elif (error := task.exception()) is not None:  # raised where the result is waited for
                fail(future, error)
            else:
                settle(future, task.result())

        task.add_done_callback(copy)

    async def complete(self, chat: Chat) -> Reply:
        """Try hosts until one replies. After the retries: no text if a host is alive, else another round."""
        async with self._slots:
            while True:
                for attempt in range(self.config.retries + 1):
                    host = await self._host()
                    self.requests += 1
                    try:
                        text, is_complete = await self._request(host, chat)
                        return Reply(text, host.url, is_complete=is_complete)
                    except _RequestFailed as failure:
                        reason = f"{self.service.noun} {host.url}: {failure}"
                        if failure.status in _REFUSED:
                            log.warning("%s %s refused a request: %s", self.service.noun, host.url, failure)
                            return Reply("", host.url, reason)
                        await asyncio.sleep(self._back_off(attempt, failure))
                if await self._any_alive():
                    return Reply("", host.url, reason)

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
        """Warn that every host is down, every WARN_EVERY_S; raise ServersDown after all_down_wait_s."""
        self._down_since = self._down_since or now
        down_s, limit = now - self._down_since, self.config.all_down_wait_s
        errors = "; ".join(f"{host.url}: {host.last_error}" for host in self.hosts)
        if down_s >= limit:
            raise ServersDown(
                f"no {self.service.noun} host replied for {down_s:.0f} s ({errors}); bring one up and "
                f"{self.service.advice.format(limit_s=limit)}"
            )
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning(
                "all %s hosts are down for %.0f s, waiting up to %.0f s: %s", self.service.noun, down_s, limit, errors
            )

    async def _probe(self, host: _Host) -> bool:
        """Return whether a host completes a short chat again, or is only busy; close its circuit breaker if so."""
        host.probing = True
        try:
            await self._request(host, self.service.probe)
        except _RequestFailed as failure:
            if failure.status not in _NOT_DOWN:
                return False
            host.failures = 0
        finally:
            host.probing = False
        return True

    async def _request(self, host: _Host, chat: Chat) -> tuple[str, bool]:
        """Return the text of one reply, and whether it is complete.

        Every fault of a server or the network becomes _RequestFailed.
        """
        host.in_flight += 1
        try:
            # the exchange has a time-out too: a server that sends a byte now and then never meets the read time-out
            limit = self.config.connect_timeout_s + self.config.read_timeout_s
            reply = await asyncio.wait_for(self._exchange(host, chat), limit)
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
            return reply
        finally:
            host.in_flight -= 1
        if failure.status not in _NOT_DOWN:
            host.record_failure(str(failure))
        raise failure

    async def _exchange(self, host: _Host, chat: Chat) -> tuple[str, bool]:
        if not (self.config.model or host.model):
            host.model = (await self._json("GET", f"{host.url}/v1/models", None))["data"][0]["id"]
        body = {
            "model": self.config.model or host.model,
            "messages": chat,
            "temperature": 0,
            "max_tokens": self.service.max_tokens,
        }
        reply = await self._json("POST", f"{host.url}/v1/chat/completions", body)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("the reply has no text")
        return text, choice.get("finish_reason") != "length"

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

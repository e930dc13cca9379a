"""Replies of a language model for `oreal data merge` and `oreal data skills`, stored beside the output.

A chat that has a reply is not sent again, so an interrupted command continues where it ended. A request that fails is
not stored: the next start sends it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, TypeVar

from oreal_megatron.config import JudgeConfig, RunStopped
from oreal_megatron.runtime import files
from oreal_megatron.runtime.chat_client import Chat, ChatClient, Reply, ServersDown, Service

SUFFIX = ".replies.jsonl"
WINDOW = 1024  # items that are read ahead
THINKING_END = "</think>"
ALL_DOWN_WAIT_S = 60.0
PROBE = [{"role": "user", "content": "What is 1 + 1?"}]
# Reasons for an item without a usable text.
NO_REPLY = "no reply from the server; start again to repeat the request"
CUT_OFF = "a reply cut off at --max-tokens"
EMPTY = "an empty reply"
REASONS = (NO_REPLY, CUT_OFF, EMPTY)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Chats(Protocol):
    """A client of language models."""

    def submit(self, chat: Chat) -> Future[Reply]:
        """Return a future reply."""
        ...


class Text(NamedTuple):
    """The text of a reply without the model's thinking, or one of REASONS for which there is none."""

    text: str
    reason: str = ""


class Replies:
    """Replies by chat, from the file OUT.replies.jsonl or from the servers; for several threads."""

    def __init__(self, output: Path, client: Chats, model: str):
        self.path = output.with_name(output.name + SUFFIX)
        self.client, self.model = client, model  # the model's name and settings are a part of the key
        self._lock = threading.Lock()
        rows = files.complete_json_lines(self.path)
        self._stored: dict[str, tuple[str, bool]] = {key: (text, complete) for key, text, complete in rows}
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a")

    def __enter__(self) -> Replies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._file.close()

    def text(self, chat: Chat) -> Text:
        """Return the text of the reply to a chat; raises ServersDown."""
        key = hashlib.sha256(json.dumps([self.model, chat]).encode()).hexdigest()
        if key not in self._stored:
            with self._lock:
                if self._file.closed:  # the command ends: nothing may be submitted to a client that closes
                    raise CancelledError
                future = self.client.submit(chat)
            reply = future.result()
            if reply.reason:
                return Text("", NO_REPLY)
            self._store(key, reply)
        text, is_complete = self._stored[key]
        answer = text.rpartition(THINKING_END)[2].strip()
        if not is_complete or answer.startswith("<think>"):
            return Text("", CUT_OFF)
        return Text(answer, "" if answer else EMPTY)

    def _store(self, key: str, reply: Reply) -> None:
        with self._lock:
            if key in self._stored or self._file.closed:
                return
            self._stored[key] = reply.text, reply.is_complete
            self._file.write(json.dumps([key, reply.text, reply.is_complete]) + "\n")
            self._file.flush()


@contextmanager
def connect(output: Path, settings: JudgeConfig, max_tokens: int) -> Iterator[Replies]:
    """Open the replies beside an output and a client of the servers; RunStopped where all of these are down."""
    service = Service("server", "start the command again", PROBE, max_tokens)
    client = ChatClient(dataclasses.replace(settings, all_down_wait_s=ALL_DOWN_WAIT_S), service)
    try:
        with Replies(output, client, f"{settings.model or ' '.join(settings.urls)} {max_tokens}") as replies:
            yield replies
    except ServersDown as error:
        raise RunStopped(f"{error}. {output}{SUFFIX} holds the replies so far") from error
    finally:
        client.close()


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the results in the order of the items; an error of one ends the others that have not begun."""
    source = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        while window := list(islice(source, WINDOW)):
            yield from pool.map(function, window)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

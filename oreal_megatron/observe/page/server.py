"""Server of the page of `oreal report --serve`: built again when the logs of a run grow; the browser then reloads it.

On other addresses than this machine's own, every request needs the token of this start. Rollouts are untrusted texts
and may be confidential: no other site may read or embed what is served, whatever the browser has open.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.page.page import Refresh, write
from oreal_megatron.observe.run_report import read_run

LOGS = ("metrics.jsonl", "evaluations.jsonl")
COOKIE = "oreal_report"
BUILD_SHARE = 0.05  # most of the time that building may take
SHORTEST_POLL_S = 5.0
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def serve(runs: Sequence[Path], out: Path, most_steps: int, host: str, port: int) -> None:
    """Serve the page of runs until an interrupt."""
    page = LivePage(runs, out, most_steps)
    page.page()
    with PageServer(host, port, page) as server:
        print(f"page: {server.url} (Ctrl-C ends it; {out} stays)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class LivePage:
    """The page and the rollouts beside it, on disk; built again where a log of a run has grown."""

    def __init__(self, runs: Sequence[Path], out: Path, most_steps: int):
        self.runs, self.out, self.most_steps = runs, out, most_steps
        self.lock, self.built, self.poll_s = threading.Lock(), "", SHORTEST_POLL_S

    def version(self) -> str:
        """Return a text that changes when a log of a run grows."""
        logs = [run / name for run in self.runs for name in LOGS]
        return "-".join(str(log.stat().st_size if log.is_file() else 0) for log in logs)

    def page(self) -> bytes:
        """Return the page, built again if it is outdated; the former one where that fails."""
        with self.lock:
            if (version := self.version()) != self.built:
                self._build(version)
            return self.out.read_bytes()

    def rollouts(self, name: str) -> bytes | None:
        """Return a file of the rollouts beside the page, by its path from there; None if there is none."""
        folder = re.escape(f"{self.out.stem}_rollouts")
        file = self.out.parent / name
        with self.lock:
            known = re.fullmatch(rf"{folder}/run_\d+_step_\d+\.js", name) and file.is_file()
            return file.read_bytes() if known else None

    def _build(self, version: str) -> None:
        begin = time.monotonic()
        try:
            records = [read_run(run) for run in self.runs]
            write(records, self.out, self.most_steps, Refresh(version, self.poll_s))
        except ConfigError as error:
            if not self.built:
                raise
            log.warning("the page stays as it is: %s", error)
            return
        self.built = version
        self.poll_s = max(SHORTEST_POLL_S, (time.monotonic() - begin) / BUILD_SHARE)


class PageServer(ThreadingHTTPServer):
    """HTTP server of one page."""

    daemon_threads = True

    def __init__(self, host: str, port: int, page: LivePage):
        self.page, self.host = page, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(24)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:  # OverflowError: of a port above 65535
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"the page cannot be served on {host} port {port}: {reason}; choose others with --host and --port"
            ) from None

    @property
    def url(self) -> str:
        """Address to open, with the token if there is one."""
        query = f"?token={self.token}" if self.token else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/{query}"


class Handler(BaseHTTPRequestHandler):
    """Answers to GET: the page, its version, and the rollouts beside it."""

    server: PageServer
    server_version, sys_version, timeout = "oreal", "", 30

    def do_GET(self) -> None:
        """Answer a request."""
        url = urlsplit(self.path)
        given = parse_qs(url.query).get("token", [""])[0]
        if not self._is_allowed(given):
            return self._send(HTTPStatus.FORBIDDEN, b"forbidden: open the address that `oreal report` printed\n")
        if url.path == "/":
            return self._send(HTTPStatus.OK, self.server.page.page(), "text/html; charset=utf-8", cookie=given)
        if url.path == "/version":
            return self._send(HTTPStatus.OK, self.server.page.version().encode())
        content = self.server.page.rollouts(url.path[1:])
        if content is None:
            return self._send(HTTPStatus.NOT_FOUND, b"not found\n")
        return self._send(HTTPStatus.OK, content, "text/javascript; charset=utf-8")

    def _is_allowed(self, given: str) -> bool:
        """Return whether a request has the token; without one, whether it names this machine and not another site.

        A site could let its own name point to this machine (DNS rebinding); its requests then carry that name.
        """
        token = self.server.token
        if not token:
            host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
            return is_loopback(host)
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        return any(
            hmac.compare_digest(value.encode(), token.encode()) for value in (given, cookie.value if cookie else "")
        )

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8", cookie: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if cookie and cookie == self.server.token:
            self.send_header("Set-Cookie", f"{COOKIE}={cookie}; HttpOnly; SameSite=Strict; Path=/")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, text: str, *values: object) -> None:
        """Print nothing: addresses hold the token."""

"""Real servers on loopback that fail on purpose: files over HTTP, and a front for another server.

What goes wrong is decided by counting requests, so that a test always meets it: 1 of `fail` answers is a 503,
1 of `stall` is never finished, 1 of `cut` ends in the middle.
"""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Faults:
    """What to do wrong, and what was seen. 0: never."""

    fail: int = 0
    stall: int = 0
    cut: int = 0
    ranges: bool = True
    status: dict[str, int] = field(default_factory=dict)
    """Answers for single files, by name."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by path."""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by what became of them."""
    released: threading.Event = field(default_factory=threading.Event)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fate(self) -> str:
        """good, fail, stall or cut."""
        with self._lock:
            self._count += 1
            number = self._count
            fates = [("stall", self.stall), ("fail", self.fail), ("cut", self.cut)]
            fate = next((name for name, each in fates if each and number % each == each - 1), "good")
            self.seen[fate] += 1
            return fate

    def add(self, path: str, count: int) -> None:
        with self._lock:
            self.sent[path] += count


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    faults: Faults
    folder: Path
    upstream: str

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.faults.released.is_set():  # the server is gone, and this is a connection that was kept
            self.close_connection = True
            return
        if (status := self.faults.status.get(path.rpartition("/")[2])) is not None:
            self._send(status, {}, b"")
            return
        fate = self.faults.next_fate()
        if fate == "fail":
            self._send(503, {}, b"")
            return
        status, headers, body = self._content(path)
        self._send(status, headers, body, fate)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fate: str = "good") -> None:
        path = unquote(urlsplit(self.path).path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fate != "good" and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.faults.add(path, len(body) // 2)
            if fate == "stall":
                self.faults.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)
        self.faults.add(path, len(body))

    def _content(self, path: str) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError


class _FileHandler(_Handler):
    def _content(self, path: str) -> tuple[int, dict[str, str], bytes]:
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        data = file.read_bytes()
        headers = {"ETag": f'"{file.stat().st_mtime_ns}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(len(data))}, b""
        if not self.faults.ranges or not asked:
            return 200, headers, data
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if int(first) >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        part = data[int(first) : int(last) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return 206, headers, part


class _FrontHandler(_Handler):
    def _content(self, path: str) -> tuple[int, dict[str, str], bytes]:
        length = int(self.headers.get("Content-Length") or 0)
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers.items()))
        answer = connection.getresponse()
        body = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        connection.close()
        return answer.status, kept, body


_HOP = {"transfer-encoding", "connection", "content-length", "server", "date"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the usual five, a burst of connections waits for seconds
    block_on_close = False  # stalled answers are still waiting

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # clients that give up break the connection


@contextmanager
def _serving(handler: type[_Handler], faults: Faults) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        faults.released.set()
        server.shutdown()
        server.server_close()


@contextmanager
def file_server(folder: Path, faults: Faults) -> Iterator[str]:
    """Serve a folder; yields the address of it."""
    with _serving(type("Handler", (_FileHandler,), {"folder": folder, "faults": faults}), faults) as url:
        yield url


@contextmanager
def front(upstream: str, faults: Faults) -> Iterator[str]:
    """Stand before the server at `host:port`, and hand on what is asked; yields the address."""
    with _serving(type("Handler", (_FrontHandler,), {"upstream": upstream, "faults": faults}), faults) as url:
        yield url

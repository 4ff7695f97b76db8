"""A proxy before an HTTP server that spoils a share of the requests, in the ways in which networks and stores do."""

import contextlib
import http.client
import random
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

FAULTS = ("refuse", "lose", "reset", "cut", "stall", "stall_midway")
"""503 without doing it; doing it and answering 500; reset before the answer; reset in the middle of the answer's body; no
answer; no more of the answer's body than half."""


@dataclass
class _Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    length: int = field(default=-1)
    """Length to announce; -1 is that of the body."""

    def head(self) -> bytes:
        length = len(self.body) if self.length < 0 else self.length
        headers = [*self.headers, ("Content-Length", str(length))]
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class FaultyProxy:
    """Hands requests on to the server at `port`, but for a share `rate` of them, drawn with a seed."""

    def __init__(self, port: int, *, seed: int = 0, stall_sec: float = 60.0) -> None:
        self.rate = 0.0
        self.kinds: Sequence[str] = FAULTS
        self.only = ""
        """Spoil only requests with this in `METHOD /target`."""
        self.faults: Counter[str] = Counter()
        """How often each fault was made."""
        self.requests: list[str] = []
        """`METHOD /target` of each request."""
        self._upstream, self._stall_sec = port, stall_sec
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                proxy._serve(self)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = True

            def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
                assert isinstance(request, socket.socket)
                with proxy._lock:
                    proxy._open.discard(request)
                request.close()

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that gave up is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._close_idle()
        self._server.server_close()
        self._thread.join()

    def _close_idle(self) -> None:
        """End the connections that clients keep for later, which threads wait at."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _fault(self, request: _Request) -> str | None:
        line = f"{request.method} {request.target}"
        with self._lock:
            self.requests.append(line)
            drawn, kind = self._random.random(), self._random.choice(self.kinds)
            if drawn >= self.rate or self.only not in line:
                return None
            self.faults[kind] += 1
            return kind

    def _serve(self, handler: socketserver.StreamRequestHandler) -> None:
        with self._lock:
            self._open.add(handler.connection)
        while (request := _read_request(handler)) is not None:
            fault = self._fault(request)
            if fault in ("reset", "stall"):
                if fault == "stall":
                    self._stopped.wait(self._stall_sec)
                _reset(handler.connection)
                return
            answer = (
                _Answer(503, "Slow Down", [], b"<Error><Code>SlowDown</Code></Error>")
                if fault == "refuse"
                else self._forward(request)
            )
            if fault == "lose":
                answer = _Answer(500, "Internal Server Error", [], b"")
            if fault in ("cut", "stall_midway"):
                half = b"" if request.method == "HEAD" else answer.body[: len(answer.body) // 2]
                handler.wfile.write(answer.head() + half)
                handler.wfile.flush()
                if fault == "stall_midway":
                    self._stopped.wait(self._stall_sec)
                _reset(handler.connection)
                return
            handler.wfile.write(answer.head() + (b"" if request.method == "HEAD" else answer.body))
            handler.wfile.flush()

    def _forward(self, request: _Request) -> _Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream)
        try:
            connection.request(request.method, request.target, request.body, request.headers)
            found = connection.getresponse()
            body = found.read()
            kept = [(k, v) for k, v in found.getheaders() if k.lower() not in _OWN_HEADERS]
            length = int(found.headers.get("Content-Length", 0)) if request.method == "HEAD" else -1
            return _Answer(found.status, found.reason, kept, body, length)
        finally:
            connection.close()


_OWN_HEADERS = ("content-length", "transfer-encoding", "connection")


def _read_request(handler: socketserver.StreamRequestHandler) -> _Request | None:
    try:
        line = handler.rfile.readline().decode()
        if not line.strip():
            return None
        method, target, _ = line.split(" ", 2)
        headers = {}
        while (header := handler.rfile.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.strip()] = value.strip()
        length = next((int(v) for k, v in headers.items() if k.lower() == "content-length"), 0)
        return _Request(method, target, headers, handler.rfile.read(length))
    except OSError:
        return None


def _reset(connection: socket.socket) -> None:
    """When the connection is closed, the other side gets a reset and not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

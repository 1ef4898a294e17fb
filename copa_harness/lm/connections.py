"""Blocking keep-alive connections to the servers of this process, lent to whatever thread asks.

A thread that waits for its own socket is woken by the system when its answer is there. Behind an event loop it takes
two more turns at the interpreter, which many computing threads make dear: with 64 threads that compute 0.5 ms per call,
a stub server 50 ms away and two cores, one call cost 0.56 ms of CPU on a bare socket, 0.73 with http.client, 0.88 with
urllib3 and 0.81 with aiohttp on a loop of its own. Requests and answers are written and read by the standard
library's http.client; every wait is bounded by one deadline. Knows nothing of models, prompts or budgets.
"""

from __future__ import annotations

import http.client
import io
import math
import select
import socket
import ssl
import threading
import time
from collections import deque
from typing import Any
from urllib.parse import SplitResult

from copa_harness.lm.forks import generation

MOST_IDLE = 1024
"""Idle connections kept per server."""

TRUSTED_S = 0.5
"""Seconds a connection may have been idle before it is looked at: servers close what is idle for longer."""

Headers = list[tuple[str, str]]
Reply = tuple[int, str, Headers, bytes]


class NotConnectedError(OSError):
    """No connection came about: nothing was sent."""


class Connections:
    """Idle connections by server, the one used last first. Thread-safe.

    Args:
        connect_timeout_s: Longest wait for a connection.
        largest_body: Bytes of an answer after which it is given up.
    """

    def __init__(self, *, connect_timeout_s: float, largest_body: int) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._largest_body = largest_body
        self._idle: dict[tuple[str, str], deque[tuple[_Connection | _SecureConnection, float]]] = {}
        self._generation = generation()
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def send(self, method: str, url: SplitResult, *, headers: Headers, body: bytes, limit_s: float) -> Reply:
        """Send a request and wait for its whole answer.

        Args:
            method: As in HTTP.
            url: http or https, without user and password.
            headers: As in HTTP.
            body: As in HTTP.
            limit_s: Longest wait, from the start to the last byte received.

        Returns:
            Status, reason, headers and body.

        Raises:
            NotConnectedError: Nothing was sent. A `TimeoutError` stands behind it if that was the reason.
            TimeoutError: The answer was not complete in time.
            OSError: The connection broke, or what came is no HTTP.
            http.client.HTTPException: The same.
        """
        deadline_s = time.monotonic() + limit_s
        server = (url.scheme, url.netloc)
        connection = self._connected(server, url, limit_s)
        try:
            _wait_at_most(connection.sock, limit_s)
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request(method, target, body, dict(headers))
            connection.flush()
            connection.deadline_s = deadline_s
            response = connection.getresponse()
            data = self._body(response)
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._keep(server, connection)
        return response.status, response.reason, response.getheaders(), data

    def close(self) -> None:
        """Close what is idle; connections may be asked for again."""
        for idle in self._of_this_process().values():
            while idle:
                idle.pop()[0].close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.length is None and not response.chunked and response.getheader("Content-Length") is not None:
            raise http.client.HTTPException(f"got the Content-Length {response.getheader('Content-Length')!r}")
        if response.length is not None and response.length <= self._largest_body:
            return response.read()
        data = response.read(self._largest_body + 1)
        if len(data) > self._largest_body:
            raise http.client.HTTPException(f"the answer exceeds {self._largest_body:,} bytes")
        return data

    def _connected(self, server: tuple[str, str], url: SplitResult, limit_s: float) -> _Connection | _SecureConnection:
        idle = self._of_this_process().get(server)
        while idle:
            try:
                connection, used_s = idle.pop()
            except IndexError:  # another thread took it
                break
            if time.monotonic() - used_s < TRUSTED_S or not _readable(connection.sock):
                return connection
            connection.close()  # a readable idle connection is one the server closed
        timeout_s = min(self._connect_timeout_s, limit_s)
        try:
            if url.scheme == "https":
                connection = _SecureConnection(
                    url.hostname or "", url.port, timeout=timeout_s, context=self._context()
                )
            else:
                connection = _Connection(url.hostname or "", url.port, timeout=timeout_s)
            connection.connect()
        except TimeoutError as error:
            raise NotConnectedError(f"no connection within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:
            raise NotConnectedError(f"no connection to {url.netloc}: {error}") from error
        return connection

    def _keep(self, server: tuple[str, str], connection: _Connection | _SecureConnection) -> None:
        idle = self._of_this_process().setdefault(server, deque())
        if len(idle) < MOST_IDLE:
            idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def _of_this_process(self) -> dict[tuple[str, str], deque[tuple[_Connection | _SecureConnection, float]]]:
        if self._generation != generation():  # a fork must not speak over its parent's connections
            with self._lock:
                if self._generation != generation():
                    self._idle, self._generation = {}, generation()
        return self._idle

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            with self._lock:
                self._tls = self._tls or ssl.create_default_context()
        return self._tls


class _Connection(http.client.HTTPConnection):
    """Sends head and body in one piece, http.client in two, and reads with a deadline."""

    deadline_s = math.inf

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._pieces: list[bytes] = []
        # http.client makes the reader of an answer itself; this is where the deadline comes in.
        self.response_class = self._response  # type: ignore[assignment]

    def send(self, data: Any) -> None:
        """As in `http.client`, but kept until `flush`."""
        self._pieces.append(data)

    def flush(self) -> None:
        """Send what `send` was given."""
        pieces, self._pieces = self._pieces, []
        self.sock.sendall(b"".join(pieces))

    def _response(self, sock: Any, method: str) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(_Bounded(sock, self.deadline_s), method=method)  # type: ignore[arg-type]


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS."""


class _Bounded(io.RawIOBase):
    """A socket's reading side with a deadline: each wait is for what is left, so a slow drip ends as well."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock, self._deadline_s = sock, deadline_s
        self._stream = socket.SocketIO(sock, "r")
        sock._io_refs += 1  # type: ignore[attr-defined]  # as `makefile` does: closed when both are

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self, 2**16)

    def readable(self) -> bool:
        """As in `io`."""
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        """As in `io`.

        Raises:
            TimeoutError: The deadline is over.
        """
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline is over")
        _wait_at_most(self._sock, left_s)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        """As in `io`."""
        if not self.closed:
            super().close()
            self._stream.close()


def _wait_at_most(sock: socket.socket, seconds: float) -> None:
    """Set a socket's timeout unless it is that already, give or take: setting it is a system call."""
    now_s = sock.gettimeout()
    if now_s is None or not seconds <= now_s <= seconds + 0.01:
        sock.settimeout(seconds)


def _readable(sock: socket.socket) -> bool:
    try:
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            return bool(poll.poll(0))
        return bool(select.select([sock], [], [], 0)[0])
    except (OSError, ValueError):
        return True

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
import re
import select
import socket
import ssl
import threading
import time
from collections import deque
from functools import lru_cache
from urllib.parse import SplitResult

from copa_harness.lm.forks import generation

MOST_IDLE = 1024
"""Idle connections kept per server."""

TRUSTED_S = 0.5
"""Seconds a connection may have been idle before it is looked at: servers close what is idle for longer."""

_USUAL = re.compile(rb"HTTP/1\.1 ([2-5]\d\d)([^\r\n]*)\r\n((?:[!-9;-~]+:[^\r\n\x00]*\r\n)*[!-9;-~]+:[^\r\n\x00]*)")
_HEADER = re.compile(r"([!-9;-~]+):([^\r\n]*)")
_SPECIAL = ("content-length", "transfer-encoding", "connection", "content-encoding")
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

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
        self._idle: dict[tuple[str, str], deque[tuple[_Connection, float]]] = {}
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
            connection.sock.sendall(_head(method, url, tuple(headers), len(body)) + body)
            reply, reusable = connection.answer(method, deadline_s, largest_body=self._largest_body)
        except BaseException:
            connection.close()
            raise
        if reusable:
            self._keep(server, connection)
        else:
            connection.close()
        return reply

    def close(self) -> None:
        """Close what is idle; connections may be asked for again."""
        for idle in self._of_this_process().values():
            while idle:
                idle.pop()[0].close()

    def _connected(self, server: tuple[str, str], url: SplitResult, limit_s: float) -> _Connection:
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
        host, secure = url.hostname or "", url.scheme == "https"
        try:
            sock = socket.create_connection((host, url.port or (443 if secure else 80)), timeout_s)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if secure:
                    sock = self._context().wrap_socket(sock, server_hostname=host)
            except BaseException:
                sock.close()
                raise
        except TimeoutError as error:
            raise NotConnectedError(f"no connection within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:
            raise NotConnectedError(f"no connection to {url.netloc}: {error}") from error
        return _Connection(sock)

    def _keep(self, server: tuple[str, str], connection: _Connection) -> None:
        idle = self._of_this_process().setdefault(server, deque())
        if len(idle) < MOST_IDLE:
            idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def _of_this_process(self) -> dict[tuple[str, str], deque[tuple[_Connection, float]]]:
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


class _Connection:
    """A connected socket.

    Args:
        sock: Taken over; to be closed with `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def answer(self, method: str, deadline_s: float, *, largest_body: int) -> tuple[Reply, bool]:
        """The next answer, and whether the connection may be used again.

        The usual one, of known length and here at once, is read directly; http.client reads any other.
        """
        reader = _Bounded(self.sock, deadline_s)
        head, separator, body = (start := reader.start()).partition(b"\r\n\r\n")
        if separator and (match := _USUAL.fullmatch(head)) is not None:
            headers = [(name, value.strip(" \t")) for name, value in _HEADER.findall(match[3].decode("latin-1"))]
            special = {name.lower(): value for name, value in headers if name.lower() in _SPECIAL}
            complete = special.keys() == {"content-length"} and special["content-length"] == str(len(body))
            if complete and len(body) <= largest_body:
                return (int(match[1]), match[2].decode("latin-1").strip(), headers, body), True
        reader.unread(start)
        response = http.client.HTTPResponse(reader, method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            data = _body(response, largest_body)
            return (response.status, response.reason, response.getheaders(), data), not response.will_close
        finally:
            response.close()


def _body(response: http.client.HTTPResponse, largest: int) -> bytes:
    if response.length is None and not response.chunked and response.getheader("Content-Length") is not None:
        raise http.client.HTTPException(f"got the Content-Length {response.getheader('Content-Length')!r}")
    if response.length is not None and response.length <= largest:
        return response.read()
    data = response.read(largest + 1)
    if len(data) > largest:
        raise http.client.HTTPException(f"the answer exceeds {largest:,} bytes")
    return data


@lru_cache(256)
def _head(method: str, url: SplitResult, headers: tuple[tuple[str, str], ...], n_bytes: int) -> bytes:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    host = url.netloc.encode("idna" if not url.netloc.isascii() else "ascii").decode("ascii")
    own = {"host": host, "user-agent": "copa-harness", "accept-encoding": "identity", "content-length": str(n_bytes)}
    given = {name.lower() for name, _ in headers}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"{name}: {value}" for name, value in own.items() if name not in given]
    if any(_UNSENDABLE.search(line) for line in lines) or " " in target:
        raise ValueError("a header or the URL holds a control character or a space")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Bounded(io.RawIOBase):
    """A socket's reading side with a deadline: each wait is for what is left, so a slow drip ends as well."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock, self._deadline_s = sock, deadline_s
        self._seen = b""

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self, 2**16)

    def start(self) -> bytes:
        """What comes first."""
        self._wait()
        return self._sock.recv(2**16)

    def unread(self, data: bytes) -> None:
        """Let `data` be read again."""
        self._seen = data

    def readable(self) -> bool:
        """As in `io`."""
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        """As in `io`.

        Raises:
            TimeoutError: The deadline is over.
        """
        if self._seen:
            piece, self._seen = self._seen[: len(buffer)], self._seen[len(buffer) :]
            buffer[: len(piece)] = piece
            return len(piece)
        self._wait()
        return self._sock.recv_into(buffer)

    def _wait(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline is over")
        _wait_at_most(self._sock, left_s)


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

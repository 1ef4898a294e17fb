"""One pool of connections per process that any number of threads may send through.

DSPy's native client (lm15) builds requests and reads answers; this is only its transport, so every dialect it speaks
goes through here. A thread waits on a connection of its own (see `connections`, and why); what goes through a proxy, or
to a URL with a password in it, goes through aiohttp on one background event loop, which knows those. Every wait is
bounded, redirects are not followed (a credential would travel with them).

Blocking keep-alive connections to the servers of this process, lent to whatever thread asks.

A thread that waits for its own socket is woken by the system when its answer is there. Behind an event loop it takes
two more turns at the interpreter, which many computing threads make dear: with 64 threads that compute 0.5 ms per call,
a stub server 50 ms away and two cores, one call cost 0.56 ms of CPU on a bare socket, 0.73 with http.client, 0.88 with
urllib3 and 0.81 with aiohttp on a loop of its own. Requests and answers are written and read by the standard library's
http.client; every wait is bounded by one deadline.
"""

from __future__ import annotations

import asyncio
import atexit
import http.client
import io
import os
import re
import select
import socket
import ssl
import threading
import time
import urllib.request
from collections import deque
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import aiohttp
from dspy.lm15 import TimeoutError as ProviderTimedOut

from copa_harness.lm.cache.locks import fork_count
from copa_harness.lm.context import time_left_s
from copa_harness.lm.dspy_internals import (
    ConnectError,
    ConnectTimeout,
    ProtocolError,
    ReadError,
    TransportRequest,
    TransportResponse,
)

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
        self._generation = fork_count()
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
        if self._generation != fork_count():  # a fork must not speak over its parent's connections
            with self._lock:
                if self._generation != fork_count():
                    self._idle, self._generation = {}, fork_count()
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


DEFAULT_TIMEOUT_S = 600.0
"""Longest wait for a whole answer when the LM sets no `timeout`."""

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for a connection."""

LARGEST_BODY = 64 * 2**20
"""Bytes of an answer after which it is given up."""


class PooledTransport:
    """lm15's transport over the process' pool.

    Args:
        timeout_s: Longest wait for a whole answer, from the first byte sent to the last one received.
        query: What every URL carries behind its path, as in `sig=...&api-version=1`.
    """

    def __init__(self, *, timeout_s: float = DEFAULT_TIMEOUT_S, query: str = "") -> None:
        self.timeout_s = timeout_s
        self._query = query
        self._replies = threading.local()

    def stream(self, request: TransportRequest) -> TransportResponse:
        """Send a request and wait for its whole answer.

        Raises:
            ConnectError: No connection came about; nothing was sent.
            ReadError: The connection broke afterwards.
            ProviderTimedOut: The answer was not complete in time.
        """
        self._replies.last = None
        limit_s = max(0.001, min(self.timeout_s, time_left_s()))
        status, reason, headers, body = _sent(self._addressed(request), limit_s)
        self._replies.last = (status, body)
        return TransportResponse(
            status=status,
            reason=reason,
            headers=headers,
            http_version="HTTP/1.1",
            chunks=iter([body]),
            release=lambda body_consumed: None,
        )

    def _addressed(self, request: TransportRequest) -> TransportRequest:
        if not self._query:
            return request
        parts = urlsplit(request.url)
        query = "&".join(filter(None, (parts.query, self._query)))
        return replace(request, url=urlunsplit(parts._replace(query=query)))

    def last_reply(self) -> tuple[int, bytes] | None:
        """Status and body of what this thread received last, None if its last request brought nothing."""
        reply: tuple[int, bytes] | None = getattr(self._replies, "last", None)
        return reply

    def close(self) -> None:
        """The pool belongs to the process."""


_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

_connections = Connections(connect_timeout_s=CONNECT_TIMEOUT_S, largest_body=LARGEST_BODY)

atexit.register(_connections.close)


def _sent(request: TransportRequest, limit_s: float) -> Reply:
    url = urlsplit(request.url)
    if "@" in url.netloc or _is_proxied(url.hostname or "", tuple(map(os.environ.get, _PROXY_VARIABLES))):
        return _pool().send(request, limit_s)
    try:
        return _connections.send(request.method, url, headers=request.headers, body=request.body, limit_s=limit_s)
    except NotConnectedError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise ConnectTimeout(str(error)) from error
        raise ConnectError(str(error)) from error
    except TimeoutError as error:
        raise _late(limit_s) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ReadError(f"the connection broke before the answer was complete: {_named(error)}") from error


@lru_cache(256)
def _is_proxied(host: str, environment: tuple[str | None, ...]) -> bool:
    """Whether requests to `host` go through a proxy; looked up once, since the system's answer takes its time."""
    return bool(urllib.request.getproxies()) and not urllib.request.proxy_bypass(host)


def _late(limit_s: float) -> ProviderTimedOut:
    return ProviderTimedOut(
        f"no complete answer within {limit_s:.3g} s; the provider may work on it still. Raise the LM's timeout= if its "
        "answers take longer"
    )


class _Pool:
    """An event loop on a daemon thread with one aiohttp session."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="copa-http", daemon=True)
        self._thread.start()

    def send(self, request: TransportRequest, limit_s: float) -> Reply:
        """Send from any thread and wait."""
        future = asyncio.run_coroutine_threadsafe(self._send(request, limit_s), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _send(self, request: TransportRequest, limit_s: float) -> Reply:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),  # how many at once is the pace's business
                trust_env=bool(urllib.request.getproxies()),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=min(CONNECT_TIMEOUT_S, limit_s))
        try:
            async with self._session.request(
                request.method,
                request.url,
                data=request.body,
                headers=request.headers,
                timeout=timeout,
                allow_redirects=False,
            ) as reply:
                body = bytearray()
                async for chunk in reply.content.iter_chunked(2**16):
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise ProtocolError(f"the answer exceeds {LARGEST_BODY:,} bytes")
                headers = [(name, value) for name, value in reply.headers.items()]
                return reply.status, reply.reason or "", headers, bytes(body)
        except aiohttp.ConnectionTimeoutError as error:
            raise ConnectTimeout(f"no connection within {timeout.sock_connect:g} s") from error
        except asyncio.TimeoutError as error:
            raise _late(limit_s) from error
        except aiohttp.ClientConnectorError as error:
            raise ConnectError(f"no connection: {error}") from error
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            raise ReadError(f"the connection broke before the answer was complete: {_named(error)}") from error

    def close(self) -> None:
        """Close the session and end the thread."""
        if os.getpid() != self.pid or not self._thread.is_alive():
            return

        async def end() -> None:
            if self._session is not None:
                await self._session.close()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(2.0)


def _named(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_lock = threading.Lock()

_pools: dict[str, Any] = {}


def _pool() -> _Pool:
    """The pool of this process; a forked child gets its own."""
    with _lock:
        pool: _Pool | None = _pools.get("pool")
        if pool is None or pool.pid != os.getpid():
            if pool is None:
                atexit.register(_close)
            pool = _pools["pool"] = _Pool()
        return pool


def _close() -> None:
    pool = _pools.pop("pool", None)
    if pool is not None:
        pool.close()

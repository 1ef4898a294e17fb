"""HTTP for every thread of the process: connections kept alive by urllib3, and what lm15 asks of a transport.

DSPy's native client (lm15) builds requests and reads answers; this is only its transport, so every dialect it speaks
goes through here. A thread waits on a connection of its own, which the system wakes when the answer is there; proxies,
certificates and keep-alive are urllib3's. What is ours:

* one deadline bounds an answer to its last byte, however slowly it drips;
* interim answers (1xx) are skipped, and a connection that brought more than its answer is not used again: nothing left
  over becomes the answer of the next request;
* a connection that was used before and is dead without a single byte of an answer is replaced once: the server closed
  it while it was idle, so nothing was bought;
* redirects are not followed: prompt and credential would travel with them. Nor are they by LiteLLM, in whose place this
  cannot be put: `no_redirects`.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import urllib3
from dspy.lm15 import TimeoutError as ProviderTimedOut
from urllib3.connection import HTTPConnection, HTTPSConnection

from copa_harness.lm.cache.locks import fork_count
from copa_harness.lm.call_context import time_left_s
from copa_harness.lm.dspy_internals import (
    ConnectError,
    ConnectTimeout,
    ReadError,
    TransportRequest,
    TransportResponse,
)

DEFAULT_TIMEOUT_S = 600.0
"""Longest wait for a whole answer when the LM sets no `timeout`."""

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for a connection."""

LARGEST_BODY = 64 * 2**20
"""Bytes of an answer after which it is given up."""

MOST_IDLE = 1024
"""Idle connections kept per server."""

_KEPT_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
"""After how many seconds (milliseconds, the last) a machine that is gone without a word is noticed by a wait for it."""

_ENVIRONMENT = (
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Environment variables that say which way requests go and whose certificates are trusted."""

_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

Headers = list[tuple[str, str]]

Reply = tuple[int, str, Headers, bytes]
"""Status, reason, headers and body."""


_no_redirects: ContextVar[bool] = ContextVar("copa_no_redirects", default=False)


@contextlib.contextmanager
def no_redirects() -> Iterator[None]:
    """In the block and its thread httpx, which LiteLLM speaks through and tells to follow redirects, follows none."""
    _teach_httpx()
    token = _no_redirects.set(True)
    try:
        yield
    finally:
        _no_redirects.reset(token)


@functools.cache
def _teach_httpx() -> None:
    try:
        import httpx
    except ImportError:  # then there is no LiteLLM either
        return
    send = httpx.Client.send

    @functools.wraps(send)
    def send_without_redirects(client: Any, request: Any, **settings: Any) -> Any:
        if _no_redirects.get():
            settings["follow_redirects"] = False
        return send(client, request, **settings)

    httpx.Client.send = send_without_redirects  # type: ignore[method-assign, assignment]


class NotConnectedError(Exception):
    """Nothing was sent, mostly since no connection came about; with a `TimeoutError` behind it, in time."""


class StaleConnectionError(Exception):
    """A connection that was used before ended without a byte of an answer."""


class _Bounded(io.RawIOBase):
    """A socket's reading side with a deadline: each wait is for what is left of the timeout it had at first."""

    def __init__(self, source: Any, sock: socket.socket) -> None:
        self._source, self._sock = source, sock
        self._deadline_s = time.monotonic() + (sock.gettimeout() or DEFAULT_TIMEOUT_S)
        self.n_received = 0
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.ended:
            return 0
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline is over")
        self._sock.settimeout(left_s)
        n_now: int = self._source.readinto(buffer)
        self.n_received += n_now
        self.ended = n_now == 0
        return n_now

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


class _Reader(io.BufferedReader):
    """What an answer is read from. If more came than the answer took, the connection is not fit for another one."""

    def __init__(self, bounded: _Bounded, sock: socket.socket) -> None:
        super().__init__(bounded, 2**16)
        self._bounded, self._sock = bounded, sock

    def close(self) -> None:
        if not self.closed:
            self._bounded.ended = True
            if self.peek(1):
                with contextlib.suppress(OSError):  # it may be closed already
                    self._sock.shutdown(socket.SHUT_RDWR)  # the pool takes it for one the server closed
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer read through `_Reader`, without the interim ones before it."""

    def __init__(self, sock: socket.socket, *arguments: Any, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self._bounded = _Bounded(self.fp.detach(), sock)
        self.fp = _Reader(self._bounded, sock)

    def begin(self, **settings: Any) -> None:
        """Read the head.

        Raises:
            http.client.RemoteDisconnected: The connection ended without a byte.
        """
        try:
            super().begin(**settings)
            while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
                self.headers = None  # type: ignore[assignment]
                super().begin(**settings)
        except ConnectionError as error:
            if self._bounded.n_received == 0:
                raise http.client.RemoteDisconnected(str(error)) from error
            raise http.client.HTTPException(f"the head of the answer was cut off: {error}") from error
        if self._bounded.ended:
            raise http.client.HTTPException("the head of the answer was cut off")


class _Connection:
    """What our connections, with and without TLS, have before urllib3's."""

    response_class: type[http.client.HTTPResponse] = _Answer
    timeout: Any
    sock: Any
    host: str
    port: int
    _is_used = False
    _held: list[bytes] | None = None

    def request(self, *arguments: Any, **settings: Any) -> None:
        """Send a request: head and body at once, where http.client sends one after the other.

        Raises:
            NotConnectedError: It is no HTTP request; nothing was sent.
        """
        self._held = []
        try:
            super().request(*arguments, **settings)  # type: ignore[misc]
        except ValueError as error:
            raise NotConnectedError(f"the request cannot be sent: {error}") from error
        finally:
            held, self._held = b"".join(self._held), None
        self.send(held)

    def send(self, data: Any) -> None:
        """Send bytes, or keep them until the request is whole."""
        if self._held is None:
            super().send(data)  # type: ignore[misc]
        else:
            self._held.append(data)

    def connect(self) -> None:
        """Connect, within the shorter time there is for that.

        Raises:
            NotConnectedError: Nothing was sent, for whatever reason.
        """
        self._is_used, limit_s = False, self.timeout
        self.timeout = min(limit_s, CONNECT_TIMEOUT_S)
        try:
            super().connect()  # type: ignore[misc]
        except (OSError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, TimeoutError):
                raise NotConnectedError(f"no connection within {self.timeout:g} s") from reason
            raise NotConnectedError(f"no connection to {self.host}:{self.port}: {reason}") from error
        finally:
            self.timeout = limit_s
        self.sock.settimeout(limit_s)

    def getresponse(self) -> Any:
        """The answer's head.

        Raises:
            StaleConnectionError: The connection brought answers before, and ended now without one.
        """
        try:
            response = super().getresponse()  # type: ignore[misc]
        except http.client.RemoteDisconnected as error:
            if self._is_used:
                raise StaleConnectionError("the server had closed the connection") from error
            raise
        self._is_used = True
        return response


class _PlainConnection(_Connection, HTTPConnection):
    pass


class _SecureConnection(_Connection, HTTPSConnection):
    pass


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS: dict[str, type[urllib3.HTTPConnectionPool]] = {"http": _PlainPool, "https": _SecurePool}

_NO_RETRIES = urllib3.Retry(False, redirect=False)


class Connections:
    """Connections of this process, kept by server and lent to whatever thread asks.

    Which proxy a request goes through, and whose certificates are trusted, say the usual environment variables at the
    time of the request: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`; `SSL_CERT_FILE` and `SSL_CERT_DIR` in
    place of the system's certificates, `REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` beside them.

    Args:
        largest_body: Bytes of an answer after which it is given up.
    """

    def __init__(self, *, largest_body: int = LARGEST_BODY) -> None:
        self._largest_body = largest_body
        self._pools: dict[tuple[str, ...], Any] = {}
        self._fork_count = fork_count()

    def send(self, method: str, url: str, *, headers: Headers, body: bytes, limit_s: float) -> Reply:
        """Send a request and wait for its whole answer.

        Args:
            method: As in HTTP.
            url: http or https. A user and password in it are sent as basic authorization, in place of any other.
            headers: As in HTTP.
            body: As in HTTP.
            limit_s: Longest wait, from the start to the last byte received.

        Raises:
            NotConnectedError: Nothing was sent.
            TimeoutError: The answer was not complete in time.
            OSError: The connection broke, or what came is no HTTP.
        """
        if any(_UNSENDABLE.search(name) or _UNSENDABLE.search(value) for name, value in headers):
            raise NotConnectedError("the request cannot be sent: a header holds a control character")
        fields = {"User-Agent": "copa-harness", **dict(headers)}
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise NotConnectedError(f"no connection: {error}") from error
        if "@" in parts.netloc:
            userinfo, _, host = parts.netloc.rpartition("@")
            parts = parts._replace(netloc=host)
            fields = {name: value for name, value in fields.items() if name.lower() != "authorization"}
            fields |= urllib3.make_headers(basic_auth=unquote(userinfo))
        deadline_s = time.monotonic() + limit_s
        try:
            return self._answered(method, parts, headers=fields, body=body, limit_s=limit_s)
        except StaleConnectionError:
            self._pools.pop(_key(parts), None)  # so that the next one is new
        try:
            left_s = max(0.001, deadline_s - time.monotonic())
            return self._answered(method, parts, headers=fields, body=body, limit_s=left_s)
        except StaleConnectionError as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """Close what is idle; connections may be asked for again."""
        self._pools.clear()

    def _answered(
        self, method: str, url: SplitResult, *, headers: dict[str, str], body: bytes, limit_s: float
    ) -> Reply:
        pool = self._pool(url)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        try:
            reply = pool.urlopen(
                method,
                url.geturl() if isinstance(pool, urllib3.ProxyManager) else target,
                headers=headers,
                body=body,
                timeout=urllib3.Timeout(total=limit_s),
                retries=_NO_RETRIES,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                data = self._body(reply)
            except BaseException:
                reply.close()
                raise
            finally:
                reply.release_conn()
        except urllib3.exceptions.TimeoutError as error:
            raise TimeoutError("the deadline is over") from error
        except urllib3.exceptions.LocationValueError as error:
            raise NotConnectedError(f"no connection: {error}") from error
        except urllib3.exceptions.HTTPError as error:
            reason = next((part for part in error.args if isinstance(part, Exception)), error)
            raise OSError(_named(reason)) from error
        received = [(name, value.strip(" \t")) for name, value in reply.headers.items()]
        return reply.status, reply.reason or "", received, data

    def _body(self, reply: urllib3.BaseHTTPResponse) -> bytes:
        if reply.status < 200:
            raise OSError(f"got the status {reply.status}, expected an answer")
        if reply.length_remaining is None and not reply.chunked and "content-length" in reply.headers:
            raise OSError(f"got the Content-Length {reply.headers['content-length']!r}")
        data = b""
        while piece := reply.read(self._largest_body + 1 - len(data)):
            data += piece
            if len(data) > self._largest_body:
                raise OSError(f"the answer exceeds {self._largest_body:,} bytes")
            if reply.length_remaining == 0:
                break
        return data

    def _pool(self, url: SplitResult) -> Any:
        if self._fork_count != fork_count():  # a fork must not speak over its parent's connections
            self._pools, self._fork_count = {}, fork_count()
        key = _key(url)
        found = self._pools.get(key)
        if found is None:
            found = self._pools.setdefault(key, _new_pool(url, _proxy_of(url.scheme, url.hostname or "")))
        return found


def _key(url: SplitResult) -> tuple[str, ...]:
    """Where the connections to a server lie: another environment may lead elsewhere, or trust another."""
    return (url.scheme, url.netloc, *(f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ))


def _proxy_of(scheme: str, host: str) -> str | None:
    """The proxy that requests to a server go through."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return None if not proxy or urllib.request.proxy_bypass(host) else proxy


def _new_pool(url: SplitResult, proxy: str | None) -> urllib3.HTTPConnectionPool | urllib3.ProxyManager:
    if not url.hostname or url.scheme not in _POOLS:
        raise NotConnectedError(f"no connection: got {url.scheme}://{url.netloc}, expected http(s)://<host>")
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEPT_ALIVE.items()
        if hasattr(socket, name)
    ]
    given: dict[str, Any] = {"socket_options": [*HTTPConnection.default_socket_options, *options]}
    if url.scheme == "https":
        given["ssl_context"] = _tls_context()
    if proxy is None:
        try:
            return _POOLS[url.scheme](url.hostname, url.port, maxsize=MOST_IDLE, **given)
        except ValueError as error:
            raise NotConnectedError(f"no connection to {url.netloc}: {error}") from error
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in _POOLS:
        raise NotConnectedError(f"got a proxy of the kind {parts.scheme}://, expected http:// or https://")
    userinfo, _, host = parts.netloc.rpartition("@")
    login = urllib3.make_headers(proxy_basic_auth=unquote(userinfo)) if userinfo else None
    manager = urllib3.ProxyManager(f"{parts.scheme}://{host}", proxy_headers=login, maxsize=MOST_IDLE, **given)
    manager.pool_classes_by_scheme = _POOLS
    return manager


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()  # which reads SSL_CERT_FILE and SSL_CERT_DIR
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if place := os.environ.get(name):
            try:
                context.load_verify_locations(**{"capath" if os.path.isdir(place) else "cafile": place})
            except OSError as error:
                raise NotConnectedError(f"cannot read the certificates that {name} names: {error}") from error
    return context


def _named(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_connections = Connections()

PROBE_S = 5.0
"""Longest wait for a sign of life."""


def is_there(url: str) -> bool:
    """Whether anything answers behind a URL, whatever it says."""
    try:
        _connections.send("GET", url, headers=[], body=b"", limit_s=PROBE_S)
    except (NotConnectedError, OSError):
        return False
    return True


class PooledTransport:
    """lm15's transport over the process' connections.

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
        self.forget()
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

    def forget(self) -> None:
        """Have `last_reply` say None until something is received."""
        self._replies.last = None

    def last_reply(self) -> tuple[int, bytes] | None:
        """Status and body of what this thread received last, None if its last request brought nothing."""
        reply: tuple[int, bytes] | None = getattr(self._replies, "last", None)
        return reply

    def close(self) -> None:
        """The connections belong to the process."""


def _sent(request: TransportRequest, limit_s: float) -> Reply:
    """A request's answer, or what went wrong in lm15's words."""
    try:
        return _connections.send(
            request.method, request.url, headers=request.headers, body=request.body, limit_s=limit_s
        )
    except NotConnectedError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise ConnectTimeout(str(error)) from error
        raise ConnectError(str(error)) from error
    except TimeoutError as error:
        raise ProviderTimedOut(
            f"no complete answer within {limit_s:.3g} s; the provider may work on it still. Raise the LM's timeout= if "
            "its answers take longer"
        ) from error
    except OSError as error:
        raise ReadError(f"the connection broke before the answer was complete: {error}") from error

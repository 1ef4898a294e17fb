"""One pool of connections per process that any number of threads may send through.

DSPy's native client (lm15) builds requests and reads answers; this is only its transport, so every dialect it speaks
goes through here. A thread waits on a connection of its own (see `connections`, and why); what goes through a proxy, or
to a URL with a password in it, goes through aiohttp on one background event loop, which knows those. Every wait is
bounded, redirects are not followed (a credential would travel with them). Knows nothing of models, prompts or budgets.
"""

from __future__ import annotations

import asyncio
import atexit
import http.client
import os
import threading
import urllib.request
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from dspy._vendor.lm15.transports import TransportRequest, TransportResponse
from dspy._vendor.lm15.transports._exceptions import ConnectError, ConnectTimeout, ProtocolError, ReadError
from dspy.lm15 import TimeoutError as ProviderTimedOut

from copa_harness.lm.connections import Connections, NotConnectedError, Reply
from copa_harness.lm.engines import time_left_s

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
        limit_s = max(0.001, min(self.timeout_s, time_left_s.get()))
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
        return _connections.send(
            request.method, url, headers=request.headers, body=request.body, limit_s=limit_s
        )
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

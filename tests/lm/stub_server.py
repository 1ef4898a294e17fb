"""An OpenAI-compatible server on the loopback interface that misbehaves as it is told, for tests and benchmarks.

Bounded: it answers at most `MOST_REQUESTS` requests, lives at most `lifetime_s` seconds, and its thread dies with the
process. Requests are matched with scripted replies in order of arrival; afterwards every request gets the default one.

    with StubServer([Reply(status=429, headers={"Retry-After": "1"})]) as stub: ...
    python stub_server.py --latency 0.05 --lifetime 60     # prints its port, for benchmarks in a process of its own
"""

import argparse
import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field

MOST_REQUESTS = 200_000
ANSWER = "[[ ## answer ## ]]\n7\n\n[[ ## completed ## ]]"
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


def completion(text=ANSWER, usage=USAGE, **message):
    """The body of an ordinary answer."""
    return {
        "id": "r", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        ],
        **({} if usage is None else {"usage": usage}),
    }  # fmt: skip


@dataclass
class Reply:
    """How one request is answered. `body`: a dict is sent as JSON, bytes as they are."""

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: object = None
    latency_s: float = 0.0
    hang: bool = False
    cut_after: int | None = None  # bytes of the body after which the connection is cut
    drip_s: float | None = None  # seconds between single bytes of the body

    def encoded(self):
        body = completion() if self.body is None else self.body
        return body if isinstance(body, bytes) else json.dumps(body).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, stub):
        self.stub, self.buffer = stub, b""

    def connection_made(self, transport):
        self.transport = transport
        self.stub.n_connections += 1

    def connection_lost(self, error):
        self.transport = None

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1")
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
            }
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.stub.asked(self, head.split(" ", 2)[1], headers, body)

    def write(self, data):
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def cut(self):
        if self.transport is not None:
            self.transport.abort()


class StubServer:
    """The server, on a thread of its own while its `with` block runs.

    Attributes:
        replies: Scripted replies not yet given.
        default: The reply once the script is over.
        requests: (path, headers, body) of everything asked, if `keep`.
        n_requests: How many.
        n_connections: Connections opened so far.
        n_under_way: Requests not yet answered; `most_under_way` is the highest this got.
    """

    def __init__(self, replies=(), *, default=None, lifetime_s=60.0, keep=True):
        self.replies, self.default, self.lifetime_s, self.keep = list(replies), default or Reply(), lifetime_s, keep
        self.requests, self.n_requests, self.n_under_way, self.most_under_way = [], 0, 0, 0
        self.n_connections = 0
        self.refuse_above = None  # more requests under way than this are answered 429
        self._ready = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self):
        return [json.loads(body) for _, _, body in self.requests]

    def asked(self, connection, path, headers, body):
        self.n_requests += 1
        if path == "/count":  # for benchmarks; counts itself
            data = json.dumps({"n_requests": self.n_requests}).encode()
            connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)
            return
        if self.n_requests > MOST_REQUESTS:
            connection.cut()
            return
        if self.keep:
            self.requests.append((path, headers, body))
        reply = self.replies.pop(0) if self.replies else self.default
        if self.refuse_above is not None and self.n_under_way >= self.refuse_above:
            reply = Reply(429, {"Retry-After": "0.01"}, {"error": {"message": "slow down", "type": "rate_limit"}})
        self.n_under_way += 1
        self.most_under_way = max(self.most_under_way, self.n_under_way)
        loop = asyncio.get_running_loop()
        if not reply.hang:
            loop.call_later(reply.latency_s, self._answer, connection, reply)

    def _answer(self, connection, reply):
        self.n_under_way -= 1
        body = reply.encoded()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **reply.headers}
        lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in headers.items())]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if reply.drip_s is not None:
            connection.write(head)
            self._drip(connection, body, reply.drip_s)
        elif reply.cut_after is not None:
            connection.write(head + body[: reply.cut_after])
            asyncio.get_running_loop().call_later(0.01, connection.cut)
        else:
            connection.write(head + body)

    def _drip(self, connection, body, pause_s):
        connection.write(body[:1])
        if len(body) > 1 and connection.transport is not None:
            asyncio.get_running_loop().call_later(pause_s, self._drip, connection, body[1:], pause_s)

    async def _serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._end.wait(), self.lifetime_s)
        server.close()

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--lifetime", type=float, default=120.0)
    parser.add_argument("--model", default="m")
    arguments = parser.parse_args()
    reply = Reply(latency_s=arguments.latency, body=Reply(body={**completion(), "model": arguments.model}).encoded())
    stub = StubServer(default=reply, lifetime_s=arguments.lifetime, keep=False)
    with stub:
        print(stub.port, flush=True)
        stub._thread.join()


if __name__ == "__main__":
    main()

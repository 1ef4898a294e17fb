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
from pathlib import Path

MOST_REQUESTS = 200_000
ANSWER = "[[ ## answer ## ]]\n7\n\n[[ ## completed ## ]]"
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


def completion(text=ANSWER, usage=USAGE, **message):
    """The body of an ordinary answer."""
    return {
        "id": "r",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        ],
        **({} if usage is None else {"usage": usage}),
    }


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
    before: bytes = b""  # what is sent before the answer, unasked, such as an interim one
    after: bytes = b""  # and what behind it

    def encoded(self):
        body = completion() if self.body is None else self.body
        return body if isinstance(body, bytes) else json.dumps(body).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, stub):
        self.stub, self.buffer, self.n_answers_left = stub, b"", stub.answers_per_connection

    def connection_made(self, transport):
        self.transport = transport
        self.stub.n_connections += 1
        self.stub.connections.add(self)

    def connection_lost(self, error):
        self.transport = None
        self.stub.connections.discard(self)

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
            if self.n_answers_left == 0:
                self.transport.close()  # without a word, and without having looked at the request
                return
            self.n_answers_left -= 1
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

    def __init__(self, replies=(), *, default=None, lifetime_s=60.0, keep=True, port=0):
        self.replies, self.default, self.lifetime_s, self.keep = list(replies), default or Reply(), lifetime_s, keep
        self.requests, self.n_requests, self.n_under_way, self.most_under_way = [], 0, 0, 0
        self.n_connections, self.port = 0, port
        self.refuse_above = None  # more requests under way than this are answered 429
        self.answers_per_connection = float("inf")  # a connection that brought so many ends at the next request
        self.connections = set()
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
        if self.takes_over(connection, path, headers, body):
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

    def takes_over(self, connection, path, headers, body):
        """Whether a request was dealt with in another way than by a scripted reply."""
        return False

    def _reply(self, connection, status, body):
        self.n_under_way += 1
        self._answer(connection, Reply(status, body=body))

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
            connection.write(reply.before + head + body + reply.after)

    def _drip(self, connection, body, pause_s):
        connection.write(body[:1])
        if len(body) > 1 and connection.transport is not None:
            asyncio.get_running_loop().call_later(pause_s, self._drip, connection, body[1:], pause_s)

    async def _serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._end.wait(), self.lifetime_s)
        server.close()
        for connection in list(self.connections):
            connection.cut()
        await asyncio.sleep(0)  # a transport is closed in the next round of the loop

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


class VllmStub(StubServer):
    """As much of vLLM as LoRA serving needs: the list of models, loading, unloading, and answers of what is loaded.

    Attributes:
        base: Name of the base model; `root` is where it says the weights come from.
        answer: `(model name, adapter path or None, messages) -> text`, called on a thread.
        loaded: Adapter name -> path; cleared by `restart`.
        updating: Whether VLLM_ALLOW_RUNTIME_LORA_UPDATING is set; `enable_lora` whether it was started with that.
        sees: Path as asked -> path to read, or None when it is not there.
        shelf_requests: (route, body) of everything but answers.
        scripted: Route -> (status, body) instead of the usual reply.
    """

    def __init__(self, answer=None, *, base="org/toy", root="", max_lora_rank=16, api_key=None, **kwargs):
        super().__init__(**kwargs)
        self.answer = answer or (lambda model, path, messages: ANSWER)
        self.base, self.root, self.max_lora_rank, self.api_key = base, root or base, max_lora_rank, api_key
        self.loaded, self.updating, self.enable_lora, self.sees = {}, True, True, lambda path: path
        self.shelf_requests, self.scripted, self.parent, self.answered = [], {}, None, []

    def restart(self):
        self.loaded.clear()

    def takes_over(self, connection, path, headers, body):
        route = path.removeprefix("/v1/")
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            self._reply(connection, 401, {"error": "Unauthorized"})
        elif route == "chat/completions":
            if self.replies:
                return False  # a scripted misfortune comes first
            document = json.loads(body)
            model = document["model"]
            self.answered.append(model)
            if model != self.base and model not in self.loaded:
                said = {"message": f"The model `{model}` does not exist.", "type": "NotFoundError", "code": 404}
                self._reply(connection, 404, {"error": said})
            else:
                asyncio.get_running_loop().create_task(self._generate(connection, model, document["messages"]))
        else:
            given = json.loads(body) if body else {}
            self.shelf_requests.append((route, given))
            self._reply(connection, *(self.scripted.get(route) or self._shelf(route, given)))
        return True

    def _shelf(self, route, given):
        if route == "models":
            cards = [{"id": self.base, "root": self.root, "parent": self.parent}]
            cards += [{"id": name, "root": path, "parent": self.base} for name, path in self.loaded.items()]
            return 200, {"object": "list", "data": cards}
        if not self.updating or route not in ("load_lora_adapter", "unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name = given["lora_name"]
        if route == "unload_lora_adapter":
            found = self.loaded.pop(name, None)
            return (200, b"Success") if found else (404, refusal(f"The lora adapter '{name}' cannot be found.", 404))
        if not name or not given["lora_path"]:
            return 400, refusal("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.loaded:
            return 400, refusal(f"The lora adapter '{name}' has already been loaded.")
        if not self.enable_lora:
            return 500, refusal("LoRA is not enabled. Use --enable-lora to enable LoRA.", 500)
        place = self.sees(given["lora_path"])
        if place is None or not Path(place, "adapter_config.json").is_file():
            return 404, refusal(f"Loading lora {name} failed: No adapter found for {given['lora_path']}", 404)
        rank = json.loads(Path(place, "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return 400, refusal(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.loaded[name] = given["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    async def _generate(self, connection, model, messages):
        place = self.loaded.get(model)
        text = await asyncio.to_thread(self.answer, model, place and self.sees(place), messages)
        self._reply(connection, 200, {**completion(text), "model": model})


def refusal(message, code=400):
    """An error as vLLM words it."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


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

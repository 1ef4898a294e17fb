"""What a database costs that several machines share, beside this machine's own cache and ledger. Prints ratios.

    python tests/benchmarks/bench_shared.py

Calls per second of the gateway with an engine that answers at once, or after 50 ms, in turns that change places:
answers and ledger on this disk, in PostgreSQL on this machine, and there with 2 ms of network (a relay) in between.
Nothing is collected by pytest.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "shared")]

from postgres_server import PostgresServer  # noqa: E402

from copa_harness.lm.budget.ledger import RunLedger, paid_by  # noqa: E402
from copa_harness.lm.cache.store import ResponseCache  # noqa: E402
from copa_harness.lm.call_context import in_context, open_scope  # noqa: E402
from copa_harness.lm.gateway import Gateway  # noqa: E402
from copa_harness.lm.scripted import ScriptedLM  # noqa: E402
from copa_harness.results import Budget  # noqa: E402
from copa_harness.shared.answers import SharedAnswers  # noqa: E402
from copa_harness.shared.database import SharedDatabase  # noqa: E402
from copa_harness.shared.ledger import SharedLedger  # noqa: E402

ROUNDS, BUDGET, NUMBERS = 3, Budget(calls=10**6), itertools.count()


def slow_relay(port, one_way_s):
    """A port that leads to `port`, each piece of data `one_way_s` later."""
    listening = socket.create_server(("127.0.0.1", 0))

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(one_way_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept():
        while True:
            here, there = listening.accept()[0], socket.create_connection(("127.0.0.1", port))
            for one in (here, there):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pair in ((here, there), (there, here)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listening.getsockname()[1]


def calls_per_s(opened, *, n, threads, latency_s, ceiling):
    """Of `n` new requests, and of the same ones replayed by another process's gateway."""
    prefix, stack = f"{next(NUMBERS)}", ExitStack()
    with stack:
        store, ledger = opened(stack, prefix)
        if ceiling:
            stack.enter_context(paid_by(ledger))

        def answer(messages):
            time.sleep(latency_s)
            return "7"

        speeds = []
        for _ in range(2):
            lm = ScriptedLM(answer, gateway=Gateway(cache=store), fingerprint="w", max_tokens=8)
            with open_scope("bench") as scope, ThreadPoolExecutor(threads) as pool:

                def ask(index, lm=lm, scope=scope):
                    with in_context(scope=scope):
                        lm(f"{prefix} {index}")

                began = time.perf_counter()
                list(pool.map(ask, range(n)))
                speeds.append(n / (time.perf_counter() - began))
        return speeds


def main():
    with PostgresServer() as server, tempfile.TemporaryDirectory() as scratch:
        url = server.database("bench")
        slow = url.replace(str(server.port), str(slow_relay(server.port, 0.001)))

        def local(stack, name):
            return ResponseCache(Path(scratch, name)), RunLedger(Path(scratch), name, budget=BUDGET)

        def shared(address):
            def opened(stack, name):
                database = SharedDatabase(address)
                stack.callback(database.close)
                ledger = SharedLedger(database, name, budget=BUDGET)
                return SharedAnswers(database, local=ResponseCache(Path(scratch, name))), ledger

            return opened

        kinds = {"disk": local, "database": shared(url), "database, 2 ms away": shared(slow)}
        for latency_s, threads, n, ceiling in (
            (0.0, 1, 40, True),
            (0.0, 1, 40, False),
            (0.05, 32, 320, True),
            (0.05, 32, 320, False),
        ):
            found = {name: [] for name in kinds}
            for turn in range(ROUNDS):
                names = list(kinds)[turn % 3 :] + list(kinds)[: turn % 3]
                for name in names:
                    found[name].append(
                        calls_per_s(kinds[name], n=n, threads=threads, latency_s=latency_s, ceiling=ceiling)
                    )
            how = "with a ceiling for the run" if ceiling else "without one"
            print(f"{latency_s * 1e3:.0f} ms latency, {threads} at once, {how}: new and replayed calls per second")
            for name, speeds in found.items():
                new, replayed = (statistics.median(column) for column in zip(*speeds, strict=True))
                pairs = list(zip(speeds, found["disk"], strict=True))
                beside = [statistics.median(there[i] / here[i] for there, here in pairs) for i in (0, 1)]
                ratios = "  ".join(f"{ratio:.2f}" for ratio in beside)
                print(f"    {name:20} {new:6.0f} {replayed:6.0f}   beside disk {ratios}", flush=True)


if __name__ == "__main__":
    main()

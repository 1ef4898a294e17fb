"""What the gateway to models costs, and what it gains: beside DSPy's own cache, client and Evaluate. Prints ratios.

    python tests/benchmarks/bench_gateway.py            # some minutes
    python tests/benchmarks/bench_gateway.py --quick

(a) microseconds per lookup of a known and of an unknown answer: the gateway, dspy.cache, bare diskcache;
(b) calls per second of a whole program (dspy.Predict) against a stub server in a process of its own, at two latencies
    and three concurrencies: copa's evaluation and gateway, `dspy.Evaluate` alone, and a bare aiohttp client;
(c) a fully cached evaluation beside DSPy's own module overhead. That overhead is what the same program costs DSPy when
    its LM answers at once from memory: an engine that returns a constant, no cache anywhere, no history;
(d) duplicates and overshoot: calls the server saw, against distinct requests and against a ceiling;
(e) 75 Iris rows with 12 demonstrations through the embedded model, beside the engine's own time for the same requests;
(f) the store of answers alone: microseconds to read and to store an answer in one thread, and milliseconds until 64 new
    threads have read, or stored, ten each;
(g) a whole program against llama.cpp's own server (xllamacpp and SmolLM2, left out where they are missing), with equal
    requests: copa's evaluation and `dspy.Evaluate`, in turns that change places.

Nothing is collected by pytest. Absolute figures depend on the machine; the ratios are taken side by side on it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="bench_gateway_")
os.environ["DSPY_CACHEDIR"] = f"{SCRATCH.name}/dspy"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp  # noqa: E402
import diskcache  # noqa: E402
import dspy  # noqa: E402
from dspy.lm15 import Message, Request, Response, TextPart, Usage  # noqa: E402

from copa_harness.errors import BudgetExhausted  # noqa: E402
from copa_harness.evaluate import evaluate  # noqa: E402
from copa_harness.evaluate.runner import default_adapter  # noqa: E402
from copa_harness.lm.budget.ledger import whole_run  # noqa: E402
from copa_harness.lm.cache.store import ResponseCache  # noqa: E402
from copa_harness.lm.call_context import CallContext, in_context, open_scope  # noqa: E402
from copa_harness.lm.engine import Engine  # noqa: E402
from copa_harness.lm.factory import build_lm  # noqa: E402
from copa_harness.lm.gateway import Gateway  # noqa: E402
from copa_harness.lm.scripted import ScriptedLM  # noqa: E402
from copa_harness.results import Budget  # noqa: E402
from copa_harness.tasks import iris  # noqa: E402

ANSWER = "[[ ## answer ## ]]\n7\n\n[[ ## completed ## ]]"
STUB = Path(__file__).parents[1] / "lm" / "stub_server.py"
sys.path.insert(0, str(STUB.parent))

from llama_server import N_SLOTS, LlamaServer, missing  # noqa: E402


class Instant:
    """An engine that answers at once."""

    def __deepcopy__(self, memo):
        return self

    def complete(self, request):
        message, usage = Message.assistant(TextPart(ANSWER)), Usage(input_tokens=1)
        return Response(id=None, model=request.model, message=message, finish_reason="stop", usage=usage)


class Server:
    """The stub server in a process of its own, with the calls it saw."""

    def __init__(self, latency_s, model="gpt-4o-mini"):
        command = [sys.executable, str(STUB), "--latency", str(latency_s), "--lifetime", "300", "--model", model]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def n_seen(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/count") as reply:
            return json.loads(reply.read())["n_requests"]


def fresh_gateway(name):
    return Gateway(cache=ResponseCache(Path(tempfile.mkdtemp(dir=SCRATCH.name)) / name))


def program_for(lm):
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    return program


def examples_of(n, mark=""):
    return [dspy.Example(question=f"{mark}{index} + 4", answer="7").with_inputs("question") for index in range(n)]


def metric(example, prediction, trace=None):
    return prediction.answer == example.answer


def best_us(action, n, repeats=3):
    """Microseconds per call, the best of a few rounds."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for index in range(n):
            action(index)
        best = min(best, (time.perf_counter() - began) / n)
    return best * 1e6


def lookups(n):
    request = Request(model="m", messages=(Message.user("hello " * 60),), system="be brief " * 60)
    lm = ScriptedLM(ANSWER, model="m", gateway=fresh_gateway("a"))

    def gateway(rollout):
        return lm.gateway.call(lm.engine, request, context=CallContext(rollout_id=rollout))

    bare = diskcache.Cache(f"{SCRATCH.name}/bare")
    text = json.dumps({"answer": ANSWER})
    rounds = iter(range(10**9))
    rows = [("gateway", best_us(lambda i: gateway(None), n), best_us(lambda i: gateway(next(rounds)), n))]

    plain = dspy.LM("openai/gpt-4o-mini", cache=True)
    from dspy.clients.call_result import CallResult
    from dspy.clients.execution import _cached, _store, prepare

    def dspys(rollout, put):
        call = prepare(plain, None, [{"role": "user", "content": "hello " * 60}], {"rollout_id": rollout})
        found = _cached(plain, call, False)
        if put and found is None:
            _store(plain, call, result, False)

    result = CallResult.native(Instant().complete(request), model_type="chat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dspys(-1, True)
        rows.append(
            ("dspy.cache", best_us(lambda i: dspys(-1, False), n), best_us(lambda i: dspys(next(rounds), True), n))
        )
    bare["k"] = text

    def bare_miss(index):
        key = f"k{next(rounds)}"
        if bare.get(key) is None:
            bare[key] = text

    rows.append(("diskcache", best_us(lambda i: bare.get("k"), n), best_us(bare_miss, n)))
    print("\n(a) one lookup, microseconds (a miss includes storing the answer)")
    for name, hit, miss in rows:
        print(f"    {name:12s} hit {hit:7.0f}   miss {miss:7.0f}")
    print(
        f"    gateway / dspy.cache: hit {rows[0][1] / rows[1][1]:.2f}, miss {rows[0][2] / rows[1][2]:.2f}", flush=True
    )


def store(n):
    cache = ResponseCache(Path(tempfile.mkdtemp(dir=SCRATCH.name)) / "f")
    answer, fresh = {"text": ANSWER * 20}, itertools.count(1)
    cache.set(f"{0:064x}", answer)

    def miss(_):
        key = f"{next(fresh):064x}"
        if cache.get(key) is None:
            cache.set(key, answer)

    actions = {"read": lambda _: cache.get(f"{0:064x}"), "store": miss}
    alone = {name: best_us(action, n) for name, action in actions.items()}
    crowd = {
        name: statistics.median(in_new_threads(action, 64, 10) for _ in range(5)) for name, action in actions.items()
    }
    print("\n(f) the store alone: " + ", ".join(f"{name} {us:.1f} us" for name, us in alone.items()))
    print("    64 new threads, ten each: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in crowd.items()), flush=True)


def in_new_threads(action, n_threads, n_each):
    """Milliseconds until that many threads, started together, have done `action` so often each."""
    together = threading.Barrier(n_threads + 1)

    def work():
        together.wait()
        for index in range(n_each):
            action(index)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    together.wait()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - began) * 1e3


def bare_client(url, n, concurrency):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello " * 100}]}).encode()

    async def run():
        gate = asyncio.Semaphore(concurrency)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one():
                async with (
                    gate,
                    session.post(
                        f"{url}/chat/completions", data=body, headers={"Content-Type": "application/json"}
                    ) as reply,
                ):
                    await reply.read()

            await asyncio.gather(*(one() for _ in range(n)))

    began = time.perf_counter()
    asyncio.run(run())
    return n / (time.perf_counter() - began)


def dspy_alone(url, model, n, concurrency, *, cache):
    lm = dspy.LM(model, api_base=url, api_key="k", cache=cache, temperature=0.0, max_tokens=50)
    program = program_for(lm)
    evaluator = dspy.Evaluate(
        devset=examples_of(n, f"{time.time()} "), metric=metric, num_threads=concurrency, display_progress=False
    )
    with dspy.context(disable_history=True):
        warm_up(program, concurrency)
        began, began_cpu = time.perf_counter(), time.process_time()
        score = evaluator(program).score
        rate, cpu = n / (time.perf_counter() - began), (time.process_time() - began_cpu) / n
    assert score == 100.0
    return rate, cpu


def warm_up(program, n):
    """Connections, price list and imports are not what is measured; a program has them after its first calls."""
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(lambda index: program(question=f"warm {time.time()} {index}"), range(2 * n)))


def ours(url, model, n, concurrency):
    lm = build_lm(
        model,
        gateway=fresh_gateway("b"),
        cache_dir=Path(SCRATCH.name),
        api_base=url,
        api_key="k",
        temperature=0.0,
        max_tokens=50,
    )
    program = program_for(lm)
    warm_up(program, concurrency)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = evaluate(program, examples_of(n, f"{time.time()} "), metric=metric, split="bench", threads=concurrency)
    rate, cpu = n / (time.perf_counter() - began), (time.process_time() - began_cpu) / n
    assert result.score == 1.0, result
    return rate, cpu


def throughput(cases, *, rounds):
    """Rounds of all contenders in turn, the median of each: other loads on the machine hit them alike."""
    print("\n(b) a whole program against the stub: calls/s (CPU ms per call of this process), medians of each")
    print("    limit = calls at once / latency: no client can be faster")
    print("    model               latency at once limit  |  copa          dspy.Evaluate  its cache on | bare aiohttp")
    for model, latency_s, concurrency, n in cases:
        mine, theirs, cached, bare, n_duplicates = [], [], [], [], 0
        with Server(latency_s, model.partition("/")[2]) as server:
            bare_client(server.url, concurrency, concurrency)
            for _ in range(rounds):
                bare.append(bare_client(server.url, n, concurrency))
                before = server.n_seen()
                mine.append(ours(server.url, model, n, concurrency))
                n_duplicates += server.n_seen() - before - 1 - 2 * concurrency - n
                theirs.append(dspy_alone(server.url, model, n, concurrency, cache=False))
                cached.append(dspy_alone(server.url, model, n, concurrency, cache=True)[0])
        copa, dspys = (statistics.median(rate for rate, _ in runs) for runs in (mine, theirs))
        copa_cpu, dspy_cpu = (statistics.median(cpu for _, cpu in runs) * 1e3 for runs in (mine, theirs))
        with_cache, alone = statistics.median(cached), statistics.median(bare)
        print(
            f"    {model:20s} {latency_s * 1e3:3.0f} ms {concurrency:5d}  {concurrency / latency_s:5.0f}  | "
            f"{copa:5.0f} ({copa_cpu:.2f})   {dspys:5.0f} ({dspy_cpu:.2f})   {with_cache:5.0f}        | {alone:5.0f}   "
            f"copa/dspy {copa / dspys:.2f} (its cache on {copa / with_cache:.2f}, CPU {dspy_cpu / copa_cpu:.2f}), "
            f"copa/aiohttp {copa / alone:.2f}; {n_duplicates} duplicates",
            flush=True,
        )


def fully_cached(n):
    examples = examples_of(n)
    lm = ScriptedLM(ANSWER, gateway=fresh_gateway("c"), temperature=0.0)
    program = program_for(lm)
    evaluate(program, examples, metric=metric, split="bench", threads=1)
    plain = program_for(dspy.LM("fake/model", engine=Instant(), cache=False, temperature=0.0))
    evaluator = dspy.Evaluate(devset=examples, metric=metric, num_threads=1, display_progress=False)
    mine, theirs, module_ours, module_theirs = [], [], [], []
    with dspy.context(disable_history=True, adapter=default_adapter()):
        for _ in range(5):
            began = time.process_time()
            evaluate(program, examples, metric=metric, split="bench", threads=1)
            mine.append(time.process_time() - began)
            with dspy.context(adapter=None):
                began = time.process_time()
                evaluator(plain)
                theirs.append(time.process_time() - began)
            began = time.process_time()
            for example in examples:
                program(question=example.question)
            module_ours.append(time.process_time() - began)
            with dspy.context(adapter=None):
                began = time.process_time()
                for example in examples:
                    plain(question=example.question)
                module_theirs.append(time.process_time() - began)
    per_call = [statistics.median(times) / n * 1e6 for times in (mine, theirs, module_ours, module_theirs)]
    print("\n(c) fully cached, one thread, CPU microseconds per example (medians of 5)")
    print(f"    copa evaluate {per_call[0]:.0f}, dspy.Evaluate with an instant engine {per_call[1]:.0f}")
    print(f"    module call: replayed {per_call[2]:.0f}, instant engine {per_call[3]:.0f}")
    ratios = per_call[0] / per_call[1], per_call[2] / per_call[3]
    print(f"    copa / dspy: evaluation {ratios[0]:.2f}, module {ratios[1]:.2f}", flush=True)


def exactness(n):
    with Server(0.01) as server:
        lm = build_lm(
            "openai/gpt-4o-mini",
            gateway=fresh_gateway("d"),
            cache_dir=Path(SCRATCH.name),
            api_base=server.url,
            api_key="k",
            temperature=0.0,
            max_tokens=50,
        )
        ceiling = n // 2
        with (
            whole_run(Budget(calls=ceiling, tokens=10**6), directory=Path(SCRATCH.name), run_id="bench"),
            open_scope("bench") as scope,
            ThreadPoolExecutor(64) as pool,
        ):

            def ask(index):
                with in_context(scope=scope):
                    try:
                        return bool(lm(f"question {index % n}"))
                    except BudgetExhausted:
                        return False

            answered = sum(pool.map(ask, range(3 * n)))
        seen = server.n_seen() - 1
    print(f"\n(d) {3 * n} requests for {n} distinct answers by 64 threads under a ceiling of {ceiling} calls:")
    duplicates = seen - scope.usage().paid_calls
    print(f"    the server saw {seen}; overshoot {max(0, seen - ceiling)}; duplicates {duplicates}")
    print(f"    {answered} answered, {scope.usage().cached_calls} of them replayed", flush=True)


class Recorder(Engine):
    """An engine that remembers what it was asked."""

    def __init__(self, engine):
        self.engine, self.requests, self.name = engine, [], engine.name

    def fingerprint(self, model):
        return self.engine.fingerprint(model)

    def complete(self, request, *, seed):
        self.requests.append(request)
        return self.engine.complete(request, seed=seed)


def embedded(rounds):
    task = iris()
    lm = build_lm("embedded", gateway=fresh_gateway("e"), cache_dir=Path(SCRATCH.name))
    engine = lm.engine
    program = task.program.deepcopy()
    for predictor in program.predictors():
        predictor.demos = list(task.trainset[:12])
    whole, own = [], []
    for _ in range(rounds + 1):
        recorder = Recorder(engine)
        program.set_lm(lm.copy(engine=recorder, gateway=fresh_gateway("e")))
        began = time.perf_counter()
        evaluate(program, task.testset, metric=task.metric, split="test")
        whole.append(time.perf_counter() - began)
        began = time.perf_counter()
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda request: engine.complete(request, seed=0), recorder.requests))
        own.append(time.perf_counter() - began)
    whole, own = (statistics.median(times[1:]) for times in (whole, own))  # the first loads the weights
    print(
        f"\n(e) {len(task.testset)} Iris rows with 12 demonstrations, embedded model: evaluation "
        f"{whole * 1e3:.0f} ms, engine alone {own * 1e3:.0f} ms; ratio {whole / own:.2f}",
        flush=True,
    )


INTENTS = {
    "how many calories are in an apple": "calories",
    "book me a flight to london": "book_flight",
    "what is twelve times nine": "calculator",
    "i need a plane ticket to rome": "book_flight",
    "how fattening is a bagel": "calories",
}


def real_server(n, rounds):
    """Requests of 16 tokens' answers behind the same demonstrations; every row is new, or the server remembered it."""
    if lacking := missing():
        print(f"\n(g) left out: {lacking}", flush=True)
        return
    numbers, settings = itertools.count(1), {"api_key": "k", "temperature": 0.0, "max_tokens": 16}

    def rows():
        words = ("fly to", "sum up", "eat", "book", "divide", "cook")
        return [
            dspy.Example(text=f"can i {words[number % 6]} {number}", intent="").with_inputs("text")
            for number in itertools.islice(numbers, n)
        ]

    def made(lm):
        program = dspy.Predict("text -> intent")
        program.demos = [dspy.Example(text=text, intent=intent) for text, intent in INTENTS.items()]
        program.set_lm(lm)
        return program

    def by_copa(url):
        folder = Path(SCRATCH.name)
        lm = build_lm("openai/m", gateway=fresh_gateway("g"), cache_dir=folder, api_base=url, **settings)
        evaluate(made(lm), rows(), metric=scored, split="bench", threads=N_SLOTS)

    def by_dspy(url):
        lm = dspy.LM("openai/m", api_base=url, cache=False, num_retries=0, **settings)
        evaluator = dspy.Evaluate(devset=rows(), metric=scored, num_threads=N_SLOTS, display_progress=False)
        with dspy.context(disable_history=True, adapter=default_adapter()):
            evaluator(made(lm))

    def scored(example, prediction, trace=None):
        return 1.0

    pairs, calls, cpu_ms = [], {by_copa: set(), by_dspy: set()}, {by_copa: [], by_dspy: []}
    with LlamaServer(lifetime_s=7200.0) as server:
        by_copa(server.url), by_dspy(server.url)
        for number in range(2 * rounds):
            took = {}
            for way in (by_copa, by_dspy) if number % 2 else (by_dspy, by_copa):
                before, began, began_cpu = server.n_seen(), time.perf_counter(), time.process_time()
                way(server.url)
                took[way] = time.perf_counter() - began
                cpu_ms[way].append((time.process_time() - began_cpu) / n * 1e3)
                calls[way].add(server.n_seen() - before)
            pairs.append((took[by_copa], took[by_dspy]))
            print(f"    copa {took[by_copa]:.2f} s, dspy.Evaluate {took[by_dspy]:.2f} s", flush=True)
    copa_s, dspy_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [theirs / mine for mine, theirs in pairs]
    ratio = statistics.median(ratios)
    print(
        f"\n(g) {n} rows, {N_SLOTS} at once, against llama.cpp's server, medians of {len(pairs)}: copa {copa_s:.2f} s, "
        f"dspy.Evaluate {dspy_s:.2f} s; calls {sorted(calls[by_copa])} and {sorted(calls[by_dspy])}; "
        f"dspy / copa {ratio:.2f} ({', '.join(f'{one:.2f}' for one in sorted(ratios))}); CPU ms per call here "
        f"{statistics.median(cpu_ms[by_copa]):.1f} and {statistics.median(cpu_ms[by_dspy]):.1f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one latency, one model, smaller rounds")
    parser.add_argument("--only", choices="abcdefg", help="one part")
    options = parser.parse_args()
    quick = options.quick

    for name in ("dspy", "copa_harness"):  # both tell of answers that were cut off, as part (g) wants them
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; dspy {dspy.__version__}")
    if options.only in (None, "a"):
        lookups(300 if quick else 1000)
    if options.only in (None, "b"):
        priced, unpriced = "openai/gpt-4o-mini", "hosted_vllm/m"  # in the price list, and not
        cases = [(priced, 0.05, 64, 600)]
        if not quick:
            sizes = [(8, 160), (64, 800), (256, 1200)]
            cases = [(priced, 0.05, *size) for size in sizes] + [(priced, 0.1, *size) for size in sizes]
            cases += [(unpriced, 0.05, *size) for size in sizes]
        throughput(cases, rounds=1 if quick else 3)
    if options.only in (None, "c"):
        fully_cached(150 if quick else 400)
    if options.only in (None, "d"):
        exactness(150 if quick else 400)
    if options.only in (None, "e"):
        embedded(1 if quick else 5)
    if options.only in (None, "f"):
        store(500 if quick else 2000)
    if options.only in (None, "g"):
        real_server(16, 1 if quick else 5)
    SCRATCH.cleanup()


if __name__ == "__main__":
    main()

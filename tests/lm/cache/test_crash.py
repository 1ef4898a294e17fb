"""Kill -9 at random moments, again and again: nothing that arrived is paid twice, no file is half written, and what a
run started again reports in the end is what an uninterrupted one reports.

One process imports everything and forks each life of a small suite from there, so a life starts in milliseconds and
is killed while it opens the cache, pays, stores, or writes its report. The moments are seeded; the bounds are counts.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = r'''
import json, os, random, signal, sqlite3, sys, time, traceback, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
from copa_harness.atomic_files import write_atomic
from copa_harness.errors import BudgetExhausted
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.call_context import in_context, open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget

root, seed, n_kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
N, CEILING = 60, 45


def note(directory, name, text):
    descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (text + "\n").encode())
    os.close(descriptor)


def life(directory, mode, run_id):
    """One run of the suite, from opening the cache to its report."""
    warnings.simplefilter("error")

    def answer(messages):
        prompt = messages[-1]["content"]
        note(directory, "paid.log", run_id + " " + prompt)
        time.sleep(0.004)
        return "answer to " + prompt

    gateway = Gateway(cache=ResponseCache(directory / "responses"))
    lm = ScriptedLM(answer, gateway=gateway, fingerprint="w", max_tokens=9)
    capped = Budget(calls=CEILING, output_tokens=10**6) if mode == "capped" else Budget(output_tokens=10**6)
    with whole_run(Budget(calls=10**4), directory=directory, run_id=run_id), open_scope("t", budget=capped) as scope:

        def ask(index):
            with in_context(scope=scope):
                try:
                    text = lm("question %d" % index)[0]
                except BudgetExhausted:
                    return None
            note(directory, "got.log", "question %d" % index)
            return text

        with ThreadPoolExecutor(1 if mode == "capped" else 4) as pool:
            answers = list(pool.map(ask, range(N)))
        report = {"answers": answers, "charged": scope.charged_calls, "exhausted": scope.exhausted,
                  "spent": scope._account.spent.output_tokens}
    write_atomic(directory / "report.json", json.dumps(report))


def start(directory, mode, run_id):
    child = os.fork()
    if child == 0:
        try:
            life(directory, mode, run_id)
            os._exit(0)
        except BaseException:
            note(directory, "errors.log", traceback.format_exc())
            os._exit(1)
    return child


def lines(directory, name):
    path = directory / name
    return path.read_text().splitlines() if path.exists() else []


def check_files(directory, reference, problems):
    database = directory / "responses" / "answers" / "cache.db"
    if database.exists() and database.stat().st_size:
        with sqlite3.connect(database) as sql:
            verdict = sql.execute("PRAGMA quick_check(1)").fetchone()[0]
        sql.close()
        if verdict != "ok":
            problems.append("store: " + verdict)
    report = directory / "report.json"
    if report.exists() and reference is not None and json.loads(report.read_text()) != reference:
        problems.append("report differs: " + report.read_text()[:300])
    if list((directory / "responses").glob("answers.damaged-*")):
        problems.append("a store was moved aside")


def suite(number, mode, reference):
    """Lives of one suite until one of them comes to its end; how many were killed, and what was wrong."""
    directory = root / ("suite %d" % number)
    directory.mkdir()
    killed, problems, lives = 0, [], 0
    while True:
        lives += 1
        arrived = set(lines(directory, "got.log"))
        n_paid = len(lines(directory, "paid.log"))
        n_at_once = 2 if mode == "two" else 1
        children = [start(directory, mode, "life-%d-%d" % (lives, index)) for index in range(n_at_once)]
        if reference is not None:
            for child in children:
                time.sleep(chance.uniform(0.0, 0.06 if lives < 40 else 2.0))
                os.kill(child, signal.SIGKILL)
        codes = [os.waitpid(child, 0)[1] for child in children]
        killed += sum(os.WIFSIGNALED(code) for code in codes)
        bought = [line.split(" ", 1) for line in lines(directory, "paid.log")[n_paid:]]
        prompts = [prompt for _, prompt in bought]
        again = arrived & set(prompts)
        if again:
            problems.append("paid though it had arrived: %s" % sorted(again))
        per_life = [tuple(pair) for pair in bought]
        if len(per_life) != len(set(per_life)):
            problems.append("paid twice in one life")
        if mode == "two" and not any(os.WIFSIGNALED(code) for code in codes) and len(prompts) != len(set(prompts)):
            problems.append("paid by two processes")
        check_files(directory, reference, problems)
        if any(code == 0 for code in codes):
            break
    paid = [line.split(" ", 1)[1] for line in lines(directory, "paid.log")]
    n_lost = len(paid) - len(set(paid))
    problems += lines(directory, "errors.log")
    return killed, n_lost, lives, problems, json.loads((directory / "report.json").read_text())


reference = {}
for number, mode in enumerate(("plain", "capped", "two")):
    _, n_lost, _, problems, reference[mode] = suite(-1 - number, mode, None)
    assert not problems and n_lost == 0, problems
assert [a for a in reference["capped"]["answers"] if a][-1] == "answer to question %d" % (CEILING - 1)
killed, lost, problems, number = 0, 0, [], 0
while killed < n_kills and number < n_kills or number < 3:
    mode = ("plain", "capped", "two")[number % 3]
    n_killed, n_lost, lives, found, report = suite(number, mode, reference[mode])
    killed, lost, number = killed + n_killed, lost + n_lost, number + 1
    problems += found
    if n_lost > 4 * n_killed:
        problems.append("%d calls lost with %d kills" % (n_lost, n_killed))
print(json.dumps({"killed": killed, "lost": lost, "suites": number, "problems": problems}))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_fifty_kills_lose_nothing_that_arrived_and_change_no_result(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "7", "100" if os.environ.get("FUZZ") else "50"],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert result["killed"] >= 50
    assert result["suites"] >= 3

"""Exactly once across processes: whoever asks, an answer is paid once, and a killed owner's lock lapses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from copa_harness.errors import BudgetExhausted
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM

directory, mode = Path(sys.argv[1]), sys.argv[2]

def answer(messages):
    prompt = messages[-1]["content"]
    with open(directory / "paid.log", "a") as log:
        log.write(prompt + "\\n")
    time.sleep(3600 if mode == "hang" else 0.01)
    return "answer to " + prompt

lm = ScriptedLM(answer, gateway=Gateway(cache=ResponseCache(directory / "responses")), fingerprint="w")
print("ready", flush=True)
sys.stdin.readline()
prompts = ["0"] if mode != "many" else [str(i % 30) for i in range(60)]
with open_scope("t") as scope, ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(lambda p: lm(p)[0], prompts))
    right = answers == ["answer to " + p for p in prompts]
    print(json.dumps({"right": right, "paid": scope.usage().paid_calls}), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def start_(mode):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        processes.append(process)
        return process

    yield start_
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def paid(tmp_path):
    return (tmp_path / "paid.log").read_text().split()


def go(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def test_processes_asking_the_same_at_once_pay_each_answer_once(start, tmp_path):
    processes = [start("many") for _ in range(32 if os.environ.get("FUZZ") else 3)]
    go(*processes)
    results = [json.loads(process.stdout.readline()) for process in processes]
    assert all(result["right"] for result in results)
    assert sorted(paid(tmp_path)) == sorted(str(i) for i in range(30))
    assert sum(result["paid"] for result in results) == 30


def test_the_lock_of_a_killed_process_lapses(start, tmp_path):
    owner, heir = start("hang"), start("one")
    go(owner)
    while not (tmp_path / "paid.log").exists():
        assert owner.poll() is None
        time.sleep(0.01)
    go(heir)
    time.sleep(0.3)
    assert paid(tmp_path) == ["0"]  # the heir waits for the owner
    owner.send_signal(signal.SIGKILL)
    result = json.loads(heir.stdout.readline())
    assert result["right"]
    assert result["paid"] == 1

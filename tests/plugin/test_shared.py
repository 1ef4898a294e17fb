"""Machines that share a database: the same scores everywhere, each distinct request paid once, no ceiling passed.

A machine is a process with a cache directory of its own. The endpoint answers the same request once so and once so:
whoever paid again, or took an answer of its own, would have other scores.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from copa_harness.store.artifacts import load_artifact

N_KILLS = int(os.environ.get("N_KILLS", "4"))
"""Of machines and the database's server; a long run says N_KILLS=20."""

CONFTEST = """
import dspy, pytest
from copa_harness import Task
from copa_harness.shared import database

database.LEASE_S, database.BEAT_S = 2.0, 0.3

def equal(example, prediction, trace=None):
    return prediction.answer == example.answer

def rows(first, last):
    return [dspy.Example(question=f"what is {i}?", answer="yes" if i % 3 else "no").with_inputs("question")
            for i in range(first, last)]

@pytest.fixture
def copa_task():
    return Task("shared", dspy.Predict("question -> answer"), equal, rows(0, 12), rows(12, 24), rows(24, 54))
"""

SUITE = """
import pytest

def test_base(copa_evaluate):
    assert copa_evaluate().n == 30

@pytest.mark.copa(strategy="p", budget=60)
def test_optimized(copa_run):
    assert copa_run.evaluation.n == 30
"""


@pytest.fixture
def endpoint(stubs):
    counted = itertools.count()

    class Fickle(stubs.Reply):
        def encoded(self):
            text = "yes" if next(counted) % 2 else "no"
            body = stubs.completion(f"[[ ## answer ## ]]\n{text}\n\n[[ ## completed ## ]]")
            return json.dumps(body).encode()

    with stubs.StubServer(default=Fickle(latency_s=0.02), lifetime_s=600.0) as running:
        yield running


class Machine:
    """A pytest session on a machine of its own."""

    def __init__(self, folder, api_base, url, *options, network=()):
        self.folder = folder
        self.command = [
            *network,
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "suite"),
            *("--copa-lm=openai/m", f"--copa-api-base={api_base}", "--copa-threads=3"),
            *(f"--copa-cache-dir={folder / 'cache'}", f"--copa-report-dir={folder / 'reports'}", *options),
        ]
        self.environment = {**os.environ, "COPA_SHARED": url, "PYTHONPATH": os.pathsep.join(sys.path)}
        folder.mkdir()
        suite = folder / "suite"
        suite.mkdir()
        (suite / "conftest.py").write_text(CONFTEST)
        (suite / "test_shared.py").write_text(SUITE)
        (folder / "pytest.ini").write_text("[pytest]\n")

    def start(self):
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def log(self):
        return (self.folder / "log.txt").read_text()

    def scores(self):
        """The scores of its report, as the bytes they are written as."""
        report = json.loads((self.folder / "reports" / "latest.json").read_text())
        return [json.dumps([run["task"], run["strategy"], run["scores"]]) for run in report["runs"]]

    def paid(self):
        report = json.loads((self.folder / "reports" / "latest.json").read_text())
        return sum(phase["usage"]["paid_calls"] for run in report["runs"] for phase in run["phases"])


@pytest.fixture
def machines(tmp_path, endpoint, postgres):
    url, made = postgres.database("machines"), []

    def machine(*options, network=(), address="127.0.0.1"):
        there = [one.replace("127.0.0.1", address) for one in (endpoint.url, url)]
        made.append(Machine(tmp_path / f"machine-{len(made)}", *there, *options, network=network))
        return made[-1]

    yield machine
    for one in made:
        if hasattr(one, "process") and one.process.poll() is None:
            one.kill()


def n_answers(postgres):
    ((n,),) = postgres.sql("SELECT count(value) FROM copa_rows WHERE kind = 'answer'", name="machines")
    return n


def left_over(postgres):
    tables = ("copa_owners", "copa_reservations", "copa_rows WHERE value IS NULL")
    return [postgres.sql(f"SELECT count(*) FROM {table}", name="machines")[0][0] for table in tables]


def test_two_machines_at_once_have_the_same_scores_and_pay_each_request_once(machines, endpoint, postgres, tmp_path):
    options = (f"--copa-shared-files={tmp_path / 'shared'}",)
    two = [machines(*options).start(), machines(*options).start()]
    assert [one.process.wait() for one in two] == [0, 0], two[0].log + two[1].log
    assert two[0].scores() == two[1].scores()
    assert len(two[0].scores()) == 2
    assert endpoint.n_requests == n_answers(postgres) == two[0].paid() + two[1].paid()
    assert left_over(postgres) == [0, 0, 0]
    (artifact,) = (tmp_path / "shared" / "artifacts").iterdir()
    scored = json.dumps(load_artifact(artifact).scored)
    assert scored.count('"score"') >= 30  # the test answers, added after it was shared first
    third = machines(*options).start()
    assert third.process.wait() == 0, third.log
    (taken,) = (third.folder / "cache" / "artifacts").iterdir()
    assert json.dumps(load_artifact(taken).scored) == scored
    assert third.scores() == two[0].scores()
    assert third.paid() == 0


def test_machines_that_take_part_in_one_run_share_its_ceiling(machines, endpoint, postgres):
    two = [machines("--copa-total-budget=calls=25", "--copa-run=nightly").start() for _ in range(2)]
    codes = {one.process.wait() for one in two}
    assert codes <= {1, 6}, two[0].log + two[1].log
    assert endpoint.n_requests == n_answers(postgres) == 25
    assert "the whole session paid 25 of 25 calls" in two[0].log + two[1].log


def test_kills_of_machines_and_of_the_server_change_no_score_and_pay_nothing_twice(machines, endpoint, postgres):
    options = ("--copa-total-budget=calls=300", "--copa-run=killed")
    two, chance = [machines(*options).start(), machines(*options).start()], random.Random(7)
    in_flight = 0
    for number in range(N_KILLS):
        asked = endpoint.n_requests
        until_s = time.monotonic() + 30
        while endpoint.n_requests < asked + 5 and time.monotonic() < until_s:
            if all(one.process.poll() is not None for one in two):
                break
            time.sleep(0.01)
        if number % 2:
            postgres.kill()
            time.sleep(chance.uniform(0, 1))
            postgres.start()
            continue
        one = two[number // 2 % 2]
        if one.process.poll() is None:
            in_flight += 3  # at most: a call for each thread
            one.kill()
        one.start()
    assert [one.process.wait() for one in two] == [0, 0], two[0].log + two[1].log
    assert two[0].scores() == two[1].scores()
    # What a killed process had in flight was answered to nobody; everything else was paid once.
    stored, asked = n_answers(postgres), endpoint.n_requests
    assert stored <= asked <= stored + in_flight
    ((spent, reserved),) = postgres.sql("SELECT spent_calls, reserved_calls FROM copa_runs", name="machines")
    assert asked <= spent + reserved <= 300
    assert left_over(postgres)[1:] == [0, 0]  # who was killed with nothing in hand is forgotten after a day


# -- networks of their own


def relay(address, port):
    """Leads connections to `address:port` on to the same port of the loopback interface; gives what ends it."""
    listening = socket.create_server((address, port))

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                here, _ = listening.accept()
                there = socket.create_connection(("127.0.0.1", port))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listening.close


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def networks():
    """Two network namespaces joined by a bridge to this one: the link of each, and what it is entered with."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    base, names = f"copa{os.getpid() % 10**6}", []
    try:
        try:
            ip("link", "add", base, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        ip("addr", "add", "10.77.0.1/24", "dev", base)
        ip("link", "set", base, "up")
        for number in (1, 2):
            names.append(name := f"{base}n{number}")
            ip("netns", "add", name)
            ip("link", "add", f"{base}v{number}", "type", "veth", "peer", "name", "there", "netns", name)
            ip("link", "set", f"{base}v{number}", "master", base, "up")
            ip("-n", name, "addr", "add", f"10.77.0.1{number}/24", "dev", "there")
            ip("-n", name, "link", "set", "there", "up")
        yield [(f"{base}v{number}", ("ip", "netns", "exec", name)) for number, name in enumerate(names, start=1)]
    finally:
        for name in names:
            ip("netns", "del", name)
        subprocess.run(["ip", "link", "del", base], check=False, capture_output=True)


def test_machines_in_networks_of_their_own_agree_even_if_one_is_cut_off_for_a_while(
    machines, endpoint, postgres, networks
):
    ends = [relay("10.77.0.1", endpoint.port), relay("10.77.0.1", postgres.port)]
    try:
        two = [machines(network=enter, address="10.77.0.1").start() for _, enter in networks]
        while endpoint.n_requests < 20:
            assert all(one.process.poll() is None for one in two), two[0].log + two[1].log
            time.sleep(0.01)
        link = networks[0][0]
        ip("link", "set", link, "down")
        time.sleep(4)  # twice a lease: what it had claimed is taken over
        ip("link", "set", link, "up")
        assert [one.process.wait() for one in two] == [0, 0], two[0].log + two[1].log
    finally:
        for end in ends:
            end()
    assert two[0].scores() == two[1].scores()
    stored, in_flight = n_answers(postgres), 3
    assert stored <= endpoint.n_requests <= stored + in_flight
    assert left_over(postgres) == [0, 0, 0]

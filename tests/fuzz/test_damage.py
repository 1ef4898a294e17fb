"""Kills and flipped bytes, whole sessions through: the same numbers, or one clear error that heals.

One process imports everything and forks each session from there. A *kill* ends a session at a random moment; the next
one must end like an uninterrupted one and pay at most what was under way again. A *flip* changes one byte of one file
(cache, journal, stage, artifact, baseline) that a finished or a killed session left. The session after it must report
the scores of an undamaged one, or end with one of our errors, no traceback, after which the next session is right; of a
baseline, which is made to be committed, that is the next one after it was restored.

    FUZZ=1 pytest tests/fuzz     100 kills and 300 flips instead of a few

At length it stops after FUZZ_DAMAGE_S=600 seconds and goes on from there the next time: what was done is in `.fuzz`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.plugin.shouting import SHOUTING

N_KILLS, N_FLIPS = map(int, os.environ.get("FUZZ_DAMAGE", "100 300" if os.environ.get("FUZZ") else "2 5").split())

CONFTEST = f"""{SHOUTING}
import time


def answer(messages):
    word = asked(messages)
    pay(messages)
    time.sleep(0.003)
    # How many demonstrations are shown decides which words are answered right, so a search goes on to its last call.
    return {{"answer": word.upper() if len(messages) > 2 and (ord(word[1]) + len(messages)) % 3 else word}}
"""

SUITE = """
import pytest

def test_base(copa_evaluate):
    assert copa_evaluate().n == 18

@pytest.mark.copa(strategy="p", budget="calls=60", max_regression=0.1)
def test_prompts(copa_run):
    copa_run.check()
"""

SCRIPT = r'''
import json, os, random, re, shutil, signal, sys, time
from pathlib import Path

import dspy, optuna, pytest
import copa_harness.evaluate.runner, copa_harness.optimize.copa, copa_harness.report.files, copa_harness.report.page
import copa_harness.session.finish, copa_harness.session.session, copa_harness.store.artifacts

root, conftest, suite = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
n_kills, n_flips, seed = map(int, sys.argv[4:7])
kept, until_s = Path(sys.argv[7]), time.monotonic() + float(sys.argv[8])
lines = kept.read_text().splitlines() if kept.exists() else []
done = {one["what"]: one for one in map(json.loads, lines) if not one["problems"]}
KINDS = {
    "cache": ".copa_cache/responses/answers/*",
    "journal": ".copa_cache/studies/*.jsonl",
    "stage": ".copa_cache/stages/*/*.json",
    "artifact": ".copa_cache/artifacts/*/*",
    "baseline": "baselines/*/*.json",
}


def start(folder, *more):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open("out.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        options = ["-q", "--rootdir=.", "--copa-threads=2", "--copa-total-budget=calls=1000", *more]
        for plugin in ("cacheprovider", "xdist", "hypothesispytest"):
            options += ["-p", "no:" + plugin]
        os._exit(int(pytest.main(options)))
    return child


def finished(folder, *more):
    """A whole session: its scores and verdicts, and what it said."""
    log = folder / "out.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(folder / "reports", ignore_errors=True)
    os.waitpid(start(folder, *more), 0)
    report = folder / "reports" / "latest.json"
    runs = json.loads(report.read_text())["runs"] if report.exists() else []
    kept = ("test", "strategy", "score", "scores", "validation")
    return [[run[part] for part in kept] for run in runs], log.read_text()


def fresh(name, template=None):
    folder = root / name
    if template is not None:
        shutil.copytree(template, folder)
        return folder
    folder.mkdir()
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_suite.py").write_text(suite)
    return folder


def paid(folder):
    path = folder / "paid.txt"
    return path.read_text().splitlines() if path.exists() else []


def note(what, outcome, problems):
    done[what] = {"what": what, "outcome": outcome, "problems": problems}
    print(done[what], file=sys.stderr, flush=True)
    with kept.open("a") as file:
        file.write(json.dumps(done[what]) + "\n")


clean = fresh("clean")
began = time.monotonic()
right, said = finished(clean, "--copa-bless")
whole_s = time.monotonic() - began
assert len(right) == 2 and len(paid(clean)) == len(set(paid(clean))), said
assert finished(clean)[0] == right


def kill(what, chance):
    folder = fresh(what)
    child = start(folder, "--copa-bless")
    time.sleep(chance.uniform(0.0, whole_s))
    os.kill(child, signal.SIGKILL)
    was_killed, problems = os.WIFSIGNALED(os.waitpid(child, 0)[1]), []
    got, said = finished(folder, "--copa-bless")
    if got != right:
        problems.append("after a kill: %s %s" % (got, said[-1500:]))
    if (again := len(paid(folder)) - len(set(paid(folder)))) > 2:
        problems.append("after a kill %d calls were paid again" % again)
    shutil.rmtree(folder)
    note(what, "killed" if was_killed else "over before", problems)


interrupted = []  # sessions that were killed in the middle of their search


def interrupt(chance):
    folder, until = fresh("interrupted %d" % len(interrupted)), chance.randrange(8, 12)
    child = start(folder, "--copa-bless")
    while not any(path.read_bytes().count(b"\n") >= until for path in folder.glob(KINDS["journal"])):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    interrupted.append(folder)


def flip(what, kind, chance):
    templates = interrupted if kind == "journal" else [clean, *interrupted] if kind == "cache" else [clean]
    folder = fresh(what, chance.choice(templates))
    files = [path for path in sorted(folder.glob(KINDS[kind])) if path.is_file() and path.stat().st_size]
    assert files, kind
    path, problems = chance.choice(files), []
    whole = path.read_bytes()
    place, other = chance.randrange(len(whole)), chance.randrange(1, 256)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ other]) + whole[place + 1 :])
    got, said = finished(folder)
    where = "%s byte %d ^ %d" % (path.relative_to(folder), place, other)
    outcome = "same"
    if got != right:
        outcome = "error"
        clear = re.search(r"^(\w*Error: |FAIL|ERROR|not comparable)", said, re.M)
        if not clear or re.search("INTERNALERROR|Traceback", said):
            problems.append("%s: no clear error: %s %s" % (where, got, said[-2500:]))
        if kind == "baseline":
            path.write_bytes(whole)
        got, said = finished(folder)
        if got != right:
            problems.append("%s: does not heal: %s %s" % (where, got, said[-2500:]))
    elif re.search("INTERNALERROR|Traceback", said):
        problems.append("%s: a traceback: %s" % (where, said[-2500:]))
    elif re.search(r"\d (failed|error)|^FAIL|not comparable", said, re.M):
        outcome = "told"
    elif re.search("Warning: ", said):
        outcome = "warned"
    note(what, "%s: %s" % (kind, outcome), problems)
    shutil.rmtree(folder)


for what in [*("kill %d" % number for number in range(n_kills)), *("flip %d" % number for number in range(n_flips))]:
    if what in done or time.monotonic() > until_s:
        continue
    kind, number, chance = what.split()[0], int(what.split()[1]), random.Random("%d %s" % (seed, what))
    if kind == "kill":
        kill(what, chance)
        continue
    while len(interrupted) < min(5, n_flips // 3):
        interrupt(chance)
    flip(what, list(KINDS)[number % len(KINDS)], chance)
print(json.dumps(list(done.values())))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sessions are forked")
def test_a_session_after_kills_or_with_a_flipped_byte_gives_the_same_numbers_or_one_error_that_heals(tmp_path):
    at_length, seed = bool(os.environ.get("FUZZ")), os.environ.get("FUZZ_SEED", "3")
    kept = Path(".fuzz" if at_length else tmp_path) / f"damage-{seed}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    limit_s = float(os.environ.get("FUZZ_DAMAGE_S", "600")) if at_length else 3600.0
    arguments = [str(tmp_path), CONFTEST, SUITE, str(N_KILLS), str(N_FLIPS), seed, str(kept.absolute()), str(limit_s)]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=600 + limit_s,
        check=False,
    )
    assert run.returncode == 0
    done = json.loads(run.stdout.splitlines()[-1])
    print(Counter(one["outcome"] for one in done))
    assert [problem for one in done for problem in one["problems"]] == []
    if len(done) < N_KILLS + N_FLIPS:
        pytest.skip(f"{len(done)} of {N_KILLS + N_FLIPS} kills and flips were right; the next run goes on from there")

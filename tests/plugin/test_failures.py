"""When something is wrong: one clear error without a traceback; and a run that is killed loses nothing it has paid."""

import json
import os
import signal
import subprocess
import sys
import time

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import pytest

import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.session.session  # noqa: F401

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = '''
import os
import time
import dspy
import pytest
from copa_harness import ScriptedLM, Task

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def answer(messages):
    """Shouts when shown how, else repeats; writes down what it was paid for."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    with open("paid.txt", "a") as log:
        log.write(repr(messages) + "\\n")
    time.sleep(float(os.environ.get("SCRIPT_SLEEP_S", "0")))
    return {"answer": word.upper() if len(messages) > 2 else word}


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


TRAIN, VAL, TEST = rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:])
PROGRAM = dspy.Predict("question -> answer")


@pytest.fixture
def copa_task():
    return Task("shout", PROGRAM, shouted, TRAIN, VAL, TEST)


@pytest.fixture
def copa_base_lm(copa_session):
    return ScriptedLM(answer, model="scripted/shout", fingerprint="shout", gateway=copa_session.models.gateway)
'''

BROKEN = """
import dspy
import pytest
from conftest import PROGRAM, TEST, TRAIN, VAL, rows, shouted
from copa_harness import ScriptedLM, Task


class TestEmptyTrainset:
    @pytest.fixture
    def copa_task(self):
        return Task("empty", PROGRAM, shouted, [], VAL, TEST)

    def test_it(self, copa_run): pass


class TestMissingField:
    @pytest.fixture
    def copa_task(self):
        return Task("missing", dspy.Predict("question, hint -> answer"), shouted, TRAIN, VAL, TEST)

    def test_it(self, copa_run): pass


class TestBrokenMetric:
    @pytest.fixture
    def copa_task(self):
        return Task("broken", PROGRAM, lambda example, prediction, trace=None: prediction.label, TRAIN, VAL, TEST)

    def test_it(self, copa_run): pass


class TestSilentModel:
    @pytest.fixture
    def copa_base_lm(self):
        return ScriptedLM([ConnectionError("refused")] * 1000)

    def test_it(self, copa_run): pass


class TestUnknownModel:
    @pytest.fixture
    def copa_base_lm(self, copa_session):
        return copa_session.base_lm(copa_session.settings.merged(lm="embeded"))

    def test_it(self, copa_run): pass


class TestNoTask:
    @pytest.fixture
    def copa_task(self):
        return "iris"

    def test_it(self, copa_run): pass


class TestUntrainable:
    @pytest.mark.copa(strategy="w")
    def test_it(self, copa_run): pass
"""

EXPECTED = [
    "TaskError: task 'empty': trainset is empty; expected at least one dspy.Example.",
    "(*test_broken.py:*)",
    "TaskError: task 'missing': trainset?0? lacks the input field 'hint' *",
    "MetricError: the metric failed on all 18 examples*has no attribute 'label'*",
    "ProviderError: no answer from the model*refused*",
    "ConfigurationError: got the language model 'embeded'*did you mean 'embedded'?",
    "ConfigurationError: copa_task: got a str, expected a copa_harness.Task*",
    "ConfigurationError: got the model 'scripted/shout', which cannot be fine-tuned*",
]

SUITE = """
import pytest

def test_base(copa_evaluate):
    assert copa_evaluate().n == 18

@pytest.mark.copa(strategy="p", budget="calls=40", min_score=0.5)
def test_prompts(copa_run):
    copa_run.check()

@pytest.mark.copa(strategy="demos -> instructions", budget="calls=40")
def test_alternating(copa_run):
    copa_run.check()
"""


@pytest.fixture
def folder(pytester):
    pytester.makeconftest(CONFTEST)
    return pytester


def latest(folder):
    return json.loads((folder.path / "reports" / "latest.json").read_text())["runs"]


def test_every_mistake_is_one_clear_error_without_a_traceback(folder):
    folder.makepyfile(test_broken=BROKEN)
    result = folder.runpytest_inprocess(*STRICT)
    result.assert_outcomes(errors=7)
    result.stdout.fnmatch_lines(EXPECTED)
    text = result.stdout.str().split("= ERRORS =")[1].split("short test summary")[0]
    assert "Traceback" not in text
    assert "def copa_run" not in text
    assert len(text.splitlines()) < 60


def test_the_whole_traceback_is_there_for_those_who_ask(folder):
    folder.makepyfile(test_broken=BROKEN)
    result = folder.runpytest_inprocess(*STRICT, "--tb=long", "-k", "BrokenMetric")
    assert "def copa_run" in result.stdout.str()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--copa-lm=embeded", "ERROR: got the language model 'embeded'*did you mean 'embedded'?"),
        ("--copa-cache-dir=conftest.py", "ERROR: the cache directory */conftest.py cannot be used*--copa-cache-dir*"),
    ],
)
def test_what_no_test_could_work_with_is_one_usage_error(folder, option, message):
    folder.makepyfile(test_suite=SUITE)
    result = folder.runpytest_inprocess(*STRICT, option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()
    assert not (folder.path / "reports").exists()


def test_a_report_that_cannot_be_written_is_said_and_fails_nothing(folder):
    folder.makepyfile(test_suite=SUITE)
    (folder.path / "reports").write_text("in the way")
    result = folder.runpytest_inprocess(*STRICT, "-k", "base")
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["*the report could not be written to*--copa-report-dir*"])


def test_workers_share_the_cache_and_the_controller_writes_one_report_in_order(folder):
    folder.makepyfile(test_suite=SUITE)
    result = folder.runpytest_subprocess(*STRICT, "-n", "2")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*task*strategy*score*", "runs: *", "report: reports/latest.html"])
    assert sorted(path.name for path in (folder.path / "reports").iterdir()) == [
        "0001.json",
        "comment.md",
        "latest.html",
        "latest.json",
    ]
    tests = [run["test"].split("::")[1] for run in latest(folder)]
    assert tests == sorted(tests, key=["test_base", "test_prompts", "test_alternating"].index)
    paid = (folder.path / "paid.txt").read_text().splitlines()
    assert len(paid) == len(set(paid))


def test_workers_that_need_the_same_optimization_make_it_together(folder, monkeypatch):
    monkeypatch.setenv("SCRIPT_SLEEP_S", "0.01")
    test = '@pytest.mark.copa(strategy="p", budget=60)\ndef test_{}(copa_run):\n    assert copa_run.score == 1.0\n'
    folder.makepyfile(test_suite="import pytest\n" + test.format("first") + test.format("second"))
    result = folder.runpytest_subprocess(*STRICT, "-n", "2")
    result.assert_outcomes(passed=2)
    paid = (folder.path / "paid.txt").read_text().splitlines()
    assert len(paid) == len(set(paid))
    runs = latest(folder)
    assert [run["validation"]["after"] for run in runs if run["strategy"] == "p"] == [1.0, 1.0]
    assert sum(run["usage"]["paid_calls"] for run in runs) == len(paid)


def test_a_wrong_marker_is_told_by_the_workers_too(folder):
    folder.makepyfile(test_suite="import pytest\n@pytest.mark.copa(min_scor=1)\ndef test_it(copa_run): pass\n")
    result = folder.runpytest_subprocess(*STRICT, "-n", "1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*unknown argument 'min_scor'. Did you mean 'min_score'?*"])


def test_a_killed_run_pays_nothing_twice_and_ends_like_an_uninterrupted_one(folder, tmp_path_factory):
    folder.makepyfile(test_suite=SUITE)
    command = [sys.executable, "-m", "pytest", "-q", *STRICT]
    paid = folder.path / "paid.txt"

    environment = {**os.environ, "SCRIPT_SLEEP_S": "0.2"}
    process = subprocess.Popen(
        [*command, "--copa-threads=2"], cwd=folder.path, env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and (not paid.exists() or len(paid.read_text().splitlines()) < 26):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = len(paid.read_text().splitlines())
    assert n_before >= 26
    assert not (folder.path / "reports").exists()

    assert subprocess.run(command, cwd=folder.path, stdout=subprocess.DEVNULL, check=False).returncode == 0
    resumed = latest(folder)
    bought = paid.read_text().splitlines()
    # The calls in flight when it was killed (two threads) had no answer yet; all others stand.
    assert len(bought) - len(set(bought)) <= 2
    assert len(bought) > n_before

    for path in (folder.path / ".copa_cache", folder.path / "reports"):
        path.rename(tmp_path_factory.mktemp("first") / path.name)
    assert subprocess.run(command, cwd=folder.path, stdout=subprocess.DEVNULL, check=False).returncode == 0
    clean = latest(folder)
    for part in ("test", "strategy", "score", "scores", "verdict", "exhausted", "validation"):
        assert [run[part] for run in resumed] == [run[part] for run in clean]
    assert len(set(paid.read_text().splitlines())) == len(set(bought))


SLOW = """
import threading, time

def test_first(copa_evaluate):
    assert copa_evaluate().n == 18

def test_never_ends(copa_evaluate, copa_session):
    from copa_harness import ScriptedLM

    def hang(messages):
        open("hangs.txt", "a").close()
        time.sleep(300)

    lm = ScriptedLM(hang, model="scripted/slow", fingerprint="slow", gateway=copa_session.models.gateway)
    copa_evaluate(lm=lm)

def test_later(copa_evaluate):
    pass
"""


def test_an_interruption_ends_a_session_whose_requests_hang_and_the_report_says_so(folder):
    folder.makepyfile(test_suite=SLOW)
    command = [sys.executable, "-m", "pytest", "-q", *STRICT, "--copa-threads=4"]
    process = subprocess.Popen(command, cwd=folder.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    patience = time.monotonic() + 120
    while process.poll() is None and not (folder.path / "hangs.txt").exists() and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=60)[0]  # the requests would hang for five minutes
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # pytest's faulthandler says where every thread stands
        pytest.fail(process.communicate(timeout=60)[0])
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "interrupted: this is what had finished" in said
    document = json.loads((folder.path / "reports" / "latest.json").read_text())
    assert document["environment"]["interrupted"] is True
    assert [run["n"] for run in document["runs"]] == [18]


def test_a_session_whose_tests_all_fail_at_setup_leaves_no_report_of_an_earlier_one(folder):
    folder.makepyfile(test_suite=SUITE)
    folder.runpytest_inprocess(*STRICT).assert_outcomes(passed=3)
    reports = folder.path / "reports"
    (reports / "own.txt").write_text("somebody's")
    conftest = folder.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("return Task(", "return 1 / 0, Task("))
    result = folder.runpytest_inprocess(*STRICT)
    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines(["no run came about; the latest report in reports was an earlier one's and is gone*"])
    assert sorted(path.name for path in reports.iterdir()) == ["0001.json", "own.txt"]
    assert "no run came about" not in folder.runpytest_inprocess(*STRICT).stdout.str()  # there is nothing left to go


def test_a_session_that_runs_no_copa_test_leaves_the_report_alone(folder):
    folder.makepyfile(test_suite=SUITE, test_plain="def test_plain():\n    assert False\n")
    folder.runpytest_inprocess(*STRICT, "test_suite.py").assert_outcomes(passed=3)
    folder.runpytest_inprocess(*STRICT, "test_plain.py").assert_outcomes(failed=1)
    folder.runpytest_inprocess(*STRICT, "--copa-disable", "test_suite.py").assert_outcomes(skipped=3)
    assert len(latest(folder)) == 3


def test_one_error_of_several_tests_is_shown_in_full_once(pytester):
    pytester.makepyfile(
        """
        import pytest
        from copa_harness.errors import ConfigurationError

        pytestmark = pytest.mark.copa

        @pytest.fixture
        def copa_task():
            raise ConfigurationError("got a model that is nowhere to be found on any machine; remedy: another one")

        @pytest.mark.parametrize("number", [1, 2, 3])
        def test_it(copa_run, number):
            pass
        """
    )
    text = pytester.runpytest_inprocess(*STRICT).stdout.str()
    assert text.count("remedy: another one") == 1
    assert text.count("full_once.py::test_it[1]: ConfigurationError: got a model") == 2

"""Without the extra `local` a suite against an endpoint runs, searches, gates and reports; local models say what
they need.
"""

import json
import os
import subprocess
import sys

import pytest

SUITE = """
import dspy
import pytest
from copa_harness import Task

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


@pytest.fixture(scope="module")
def copa_task():
    rows = [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in WORDS]
    return Task("shout", dspy.Predict("question -> answer"), shouted, rows[:12], rows[12:18], rows[18:])


@pytest.mark.copa(strategy="p", min_score=0.5, budget=60)
def test_prompts(copa_run):
    copa_run.check()
"""

BLOCKED = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in ("torch", "transformers", "peft", "safetensors")
        return None if missing else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run(folder, *arguments):
    (folder / "conftest.py").write_text(BLOCKED)
    (folder / "test_suite.py").write_text(SUITE)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def server(stubs):
    """Right when it was shown how."""

    class Shouting(stubs.StubServer):
        def takes_over(self, connection, path, headers, body):
            messages = json.loads(body)["messages"]
            word = messages[-1]["content"].split("[[ ## question ## ]]")[-1].split()[0]
            answer = word.upper() if len(messages) > 2 else word
            self._reply(connection, 200, stubs.completion(f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"))
            return True

    with Shouting() as server:
        yield server


def test_a_suite_against_an_endpoint_needs_no_torch(tmp_path, server):
    done = run(tmp_path, "--copa-lm=openai/m", f"--copa-api-base={server.url}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.000" in done.stdout
    assert (tmp_path / "reports" / "latest.html").is_file()


def test_a_local_model_says_how_to_get_it_in_one_error(tmp_path):
    done = run(tmp_path, "--copa-lm=embedded")
    assert done.returncode == 4
    assert done.stderr.count("pip install 'copa-harness[local]'") == 1
    assert "lacks the packages torch, transformers, peft, safetensors" in done.stderr

"""The composite action: its steps are run here, in a newcomer's repository, against a GitHub API on loopback."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from copa_harness.cli import main
from copa_harness.report.pull_request import MARK
from tests.plugin.test_against import CONFTEST, SUITE, WORSE, change, git

ACTION = Path(__file__).parent.parent / ".github" / "actions" / "copa"


@pytest.fixture
def api():
    """GitHub's comments, as far as they are needed; `refuses` is a status it answers writes with."""
    state = SimpleNamespace(comments=[], written=[], refuses=None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self):
            state.written.append((self.command, self.path, self.headers["Authorization"]))
            return json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]

        def do_GET(self):
            page = int(re.search(r"[?&]page=(\d+)", self.path)[1])
            self._answer(state.comments[(page - 1) * 100 : page * 100])

        def do_POST(self):
            body = self._body()
            if state.refuses:
                return self._answer({}, state.refuses)
            state.comments.append({"id": len(state.comments), "body": body})
            self._answer({}, 201)

        def do_PATCH(self):
            state.comments[int(self.path.rsplit("/", 1)[1])]["body"] = self._body()
            self._answer({})

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Of somebody who has just begun: a suite without thresholds or baselines, on a branch that has left main."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)

    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (tmp_path / ".gitignore").write_text(".copa_cache/\nreports/\n__pycache__/\n")
    write(conftest=CONFTEST, program="INSTRUCTION = 'Shout the word.'\n", test_suite=SUITE)
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("switch", "-q", "-c", "change")
    return SimpleNamespace(path=tmp_path, makepyfile=write)


def run_steps(repository, api, *, suite="-p no:cacheprovider -p no:hypothesispytest", **more):
    """Run the action's own steps as GitHub would; the exit status of the last, and what all of them printed."""
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    known = {f"inputs.{name}": one["default"] for name, one in action["inputs"].items()}
    known |= {
        "inputs.suite": suite,
        **{f"inputs.{name}": text for name, text in more.items()},
        "inputs.python": sys.executable,
        "inputs.token": "secret",
        "github.event.pull_request.number": "7",
        "steps.page.outputs.artifact-url": "https://github.example/page",
    }
    output, summary = repository.path / ".copa_cache" / "output", repository.path / ".copa_cache" / "summary.md"
    output.parent.mkdir(exist_ok=True)
    printed, status = "", 0
    for step in action["runs"]["steps"]:
        if "run" not in step:
            continue
        names = {
            name: re.sub(r"\$\{\{ (.+?) \}\}", lambda one: known[one[1]], text) for name, text in step["env"].items()
        }
        hosted = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
            "GITHUB_API_URL": api.url,
            "GITHUB_REPOSITORY": "some/body",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]],
            env=os.environ | hosted | names,
            capture_output=True,
            text=True,
            check=False,
        )
        printed, status = printed + done.stdout + done.stderr, done.returncode
        if output.exists():
            known["steps.run.outputs.status"] = output.read_text().split("status=")[-1].strip()
    return status, printed, summary.read_text() if summary.exists() else ""


def test_a_worse_branch_ends_with_status_1_an_annotation_and_a_comment_that_begins_with_it(repository, api):
    change(repository, program=WORSE)
    status, printed, summary = run_steps(repository, api)
    assert status == 1
    assert "::error file=test_suite.py,line=5,title=shout%2C none%3A fail::max_regression=0.05" in printed
    (comment,) = api.comments
    assert "Worse than merge-base" in comment["body"].splitlines()[1]
    assert comment["body"].endswith("[The page with every example](https://github.example/page)\n")
    assert "Worse than merge-base" in summary
    assert api.written == [("POST", "/repos/some/body/issues/7/comments", "Bearer secret")]
    page = (repository.path / "reports" / "latest.html").read_text()
    assert ">40 got worse</button>" in page
    assert "What did not pass" in page
    assert 'class="ex' in page


def test_an_unchanged_branch_is_green_pays_nothing_and_updates_the_comment(repository, api):
    api.comments += [{"id": n, "body": "something else"} for n in range(150)]
    api.comments.append({"id": 150, "body": f"{MARK}\nof the run before"})
    status, _, _ = run_steps(repository, api)
    assert status == 0
    assert len(api.comments) == 151
    assert api.written[-1][:2] == ("PATCH", "/repos/some/body/issues/comments/150")
    assert "1 pass, 0 calls paid." in api.comments[-1]["body"].splitlines()[1]


def test_jobs_of_a_matrix_share_a_database_and_have_a_comment_each(repository, api, postgres, monkeypatch):
    monkeypatch.setenv("COPA_SHARED", postgres.database("matrix"))
    monkeypatch.setenv("COPA_RUN", "4711-1")
    for name in ("one", "other", "one"):
        status, printed, _ = run_steps(repository, api, name=name, against="")
        assert status == 0, printed
        shutil.rmtree(repository.path / ".copa_cache")  # each job is on a machine of its own
    assert [one["body"].splitlines()[0] for one in api.comments] == [
        f"<!-- copa-harness report, {name} -->" for name in ("one", "other")
    ]
    assert [written[0] for written in api.written] == ["POST", "POST", "PATCH"]
    assert all(" 0 calls paid." in one["body"] for one in api.comments)  # the first job's comment was written anew


def test_a_token_that_may_not_write_is_a_warning(repository, api):
    api.refuses = 403
    status, printed, _ = run_steps(repository, api)
    assert status == 0
    assert "::warning::no comment: GitHub answered 403" in printed


def test_a_suite_that_never_ran_ends_as_pytest_did(repository, api):
    change(repository, conftest="import nothing_of_that_name\n")
    status, printed, _ = run_steps(repository, api)
    assert status == 4
    assert "comment.md was not written" in printed
    assert api.comments == []


@pytest.fixture
def newcomer(tmp_path, monkeypatch, capsys):
    """What `copa init` makes, committed, on a branch that has left main; `suite` as its workflow has it."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    assert main(["init"]) == 0
    assert "next: pytest suites/" in capsys.readouterr().out
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("switch", "-q", "-c", "change")
    workflow = yaml.safe_load((tmp_path / ".github" / "workflows" / "copa.yml").read_text())
    step = workflow["jobs"]["suite"]["steps"][-1]
    assert (tmp_path / step["uses"] / "action.yml").read_text() == (ACTION / "action.yml").read_text()
    assert step["with"]["against"] == "${{ github.event_name == 'pull_request' && 'merge-base' || '' }}"
    return SimpleNamespace(path=tmp_path, suite=f"{step['with']['suite']} -p no:cacheprovider")


def test_a_newcomers_worse_branch_says_what_got_worse_by_how_much_and_whether_it_could_be_noise(newcomer, api):
    program = newcomer.path / "suites" / "machines" / "program.py"
    program.write_text(re.sub(r"    program.demos = \[.*?    \]\n", "", program.read_text(), flags=re.DOTALL))
    git("commit", "-q", "-a", "-m", "shorter prompt")
    status, printed, _ = run_steps(newcomer, api, suite=newcomer.suite)
    assert status == 1, printed
    assert re.search(
        r"::error file=suites/machines/test_machines.py,line=\d+,title=machines%2C none%3A fail::", printed
    )
    first = api.comments[0]["body"].splitlines()[1]
    assert re.search(r"Worse than merge-base \(\w+\): machines, none: -0\.\d+ .*chance would do this with p ", first)
    assert "if this loss is acceptable, merge it" in api.comments[0]["body"]
    assert "--copa-bless" not in api.comments[0]["body"]
    assert "got worse</button>" in (newcomer.path / "reports" / "latest.html").read_text()


def test_a_newcomers_unchanged_branch_pays_nothing_and_is_green_in_one_line(newcomer, api):
    git("switch", "-q", "main")
    assert subprocess.run([sys.executable, "-m", "pytest", *newcomer.suite.split(), "-q"], check=False).returncode == 0
    git("switch", "-q", "change")
    (newcomer.path / "notes.txt").write_text("nothing the suite reads")
    git("add", ".")
    git("commit", "-q", "-m", "notes")
    status, printed, _ = run_steps(newcomer, api, suite=newcomer.suite)
    assert status == 0, printed
    assert "::" not in printed
    assert "1 pass, 0 calls paid." in api.comments[0]["body"].splitlines()[1]


def test_init_overwrites_nothing_and_runs_twice(tmp_path, capsys):
    (tmp_path / ".gitignore").write_text("*.log\nreports/")
    test = tmp_path / "suites" / "machines" / "test_machines.py"
    test.parent.mkdir(parents=True)
    test.write_text("mine")
    assert main(["init", str(tmp_path)]) == 0
    assert "suites/machines/test_machines.py: left as it is" in capsys.readouterr().out
    assert test.read_text() == "mine"
    assert (tmp_path / ".gitignore").read_text() == "*.log\nreports/\n.copa_cache/\n"
    assert main(["init", str(tmp_path)]) == 0
    assert "written" not in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file")]) == 2
    assert "expected a folder that takes files" in capsys.readouterr().err

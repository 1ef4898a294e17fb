"""`copa baseline`: lists, shows and compares accepted results, and says what is wrong in one line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from copa_harness.cli import main
from copa_harness.judge.power import chance_to_pass, drop_to_see, rows_to_pass
from copa_harness.results import Interval
from copa_harness.store.baselines import Baseline, read_baseline, save_baseline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, wrong in (("none", "abc"), ("p", "a")):
        scores = {letter: float(letter not in wrong) for letter in "abcdef"}
        baseline = Baseline(
            task="iris",
            name=name,
            split="test",
            lm="embedded",
            score=sum(scores.values()) / 6,
            interval=Interval(0.1, 0.9),
            scores=scores,
            fingerprints={"data": "d1", "split": "test", "metric": "m1", "program": name},
            versions={"dspy": "3.4.1"},
            commit="c0ffee0000",
            created="2026-01-02",
        )
        save_baseline(tmp_path / "baselines", baseline)
    return tmp_path


def test_list_names_every_baseline_with_its_score(folder, capsys):
    assert main(["baseline", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["iris/none", "0.500"], ["iris/p", "0.833"]]
    assert "commit c0ffee0000" in lines[0]


def test_list_of_nothing_says_how_to_accept_results(tmp_path, capsys):
    assert main(["baseline", "list", "--baseline-dir", str(tmp_path / "nowhere")]) == 0
    assert "--copa-bless" in capsys.readouterr().out


def test_a_damaged_baseline_is_listed_with_its_problem(folder, capsys):
    (folder / "baselines" / "iris" / "p.json").write_text("{")
    assert main(["baseline", "list"]) == 1
    assert "p.json cannot be read" in capsys.readouterr().err


def test_show_takes_a_name_or_a_file(folder, capsys):
    assert main(["baseline", "show", "iris/p"]) == 0
    named = capsys.readouterr().out
    assert "score   0.833 on 6 test examples" in named
    assert main(["baseline", "show", "baselines/iris/p.json"]) == 0
    assert capsys.readouterr().out == named


def test_diff_says_which_examples_moved(folder, capsys):
    assert main(["baseline", "diff", "iris/none", "iris/p"]) == 0
    text = capsys.readouterr().out
    assert "score   0.500 -> 0.833" in text
    assert "better  b  0.000 -> 1.000" in text


def test_an_unknown_name_is_refused_with_those_there_are(folder, capsys):
    assert main(["baseline", "show", "iris/w"]) == 2
    assert capsys.readouterr().err == (
        "copa: got the baseline 'iris/w', expected a file or one of those in baselines: iris/none, iris/p\n"
    )


def test_bless_runs_pytest_with_the_arguments_given(folder, monkeypatch, capsys):
    asked = []

    class Done:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda command, check: asked.append(command) or Done())
    for arguments in (["suites/", "-k", "iris"], ["-k", "iris", "suites/"]):
        assert main(["baseline", "bless", *arguments]) == 0
        assert asked[-1] == [sys.executable, "-m", "pytest", "--copa-bless", *arguments]
    Done.returncode = 1
    assert main(["baseline", "bless"]) == 1
    assert "pytest ended with status 1" in capsys.readouterr().err


def test_baselines_can_be_read_by_other_programs(folder):
    assert len(json.loads((folder / "baselines" / "iris" / "p.json").read_text())["examples"]) == 6


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from copa_harness.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["baseline", "list", "--baseline-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_power_says_what_rows_decide_and_what_enough_of_them_cost(folder, capsys):
    assert main(["power", "75", "--gates", "3", "--differ", "0.1", "--usd-per-row", "0.002"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("max_regression=0.05 on 75 rows, one of 3 such gates")
    passes = chance_to_pass(75, disagreement=0.1, margin=0.05)
    drop = drop_to_see(75, disagreement=0.1, margin=0.05, alpha=0.05 / 3)
    needed = rows_to_pass(disagreement=0.1, margin=0.05)
    assert f"passes in {100 * passes:.0f} % of runs (80 % take {needed} rows, ${0.002 * needed:.2f} a run)" in said
    assert f"a drop of {drop:.3f} is found in 80 %" in said


def test_power_of_a_baseline_takes_its_rows_its_gates_and_the_noise_of_its_draws(folder, capsys):
    known = read_baseline(folder / "baselines" / "iris" / "p.json")
    draws = {name: (1.0, 1.0, float(name != "f")) for name in known.scores}
    save_baseline(folder / "baselines", replace(known, families={"max_regression": 2}, repeats=draws))
    assert main(["power", "iris/p", "--margin", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "on 6 rows, one of 2 such gates" in said
    assert "if 11 % of answers differ" in said  # of one row in six two pairs of draws in three
    assert main(["power", "0"]) == 2

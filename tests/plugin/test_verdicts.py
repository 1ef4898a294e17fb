"""Verdicts through the plugin: baselines, gates from marker, ini and check(), early stops, repeats, leaks, Holm.

The model is a script that answers right only when it is shown how, so that a prompt search has something to find.
"""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.judge.sequential.stopping
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts
import copa_harness.store.baselines  # noqa: F401
from copa_harness.store.baselines import read_baseline

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = '''
import os
import dspy
import pytest
from copa_harness import ScriptedLM, Task

WORDS = [a + b for a in "abcdefghij" for b in "tuvwxyz"]
N_TEST = int(os.environ.get("SCRIPT_N_TEST", "30"))


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def answer(messages, seed):
    """Shouts when shown how, else repeats; draws a word wrong one time in two when it is asked again."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    if os.environ.get("SCRIPT_MUMBLES"):
        return "well..."
    if word[0] in os.environ.get("SCRIPT_UNLUCKY", ""):
        return {"answer": word}
    if os.environ.get("SCRIPT_FORGETS") and word[0] in "jih":
        return {"answer": word}
    if os.environ.get("SCRIPT_WAVERS") and seed and word[1] in "tuv":
        return {"answer": word}
    return {"answer": word.upper() if len(messages) > 2 else word}


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture(scope="session")
def copa_task():
    program = dspy.Predict("question -> answer")
    slices = (lambda example: example.question[0]) if os.environ.get("SCRIPT_SLICES") else None
    splits = rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[-N_TEST:])
    return Task("shout", program, shouted, *splits, slices=slices)


@pytest.fixture(scope="session")
def copa_base_lm(copa_session):
    version = "forgetful" if os.environ.get("SCRIPT_FORGETS") else "shout"
    return ScriptedLM(
        answer, model="scripted/shout", fingerprint=version, gateway=copa_session.models.gateway, temperature=1.0
    )
'''

GATED = """
import pytest

@pytest.mark.copa(strategy="p", max_regression=0.05)
def test_it(copa_run):
    copa_run.check()
"""


@pytest.fixture
def suite(pytester):
    pytester.makeconftest(CONFTEST)

    def run(source, *arguments):
        pytester.makepyfile(test_suite=source)
        return pytester.runpytest_inprocess(*STRICT, *arguments)

    return run


def latest(pytester):
    return json.loads((pytester.path / "reports" / "latest.json").read_text())


def baselines(pytester):
    return sorted((pytester.path / "baselines").glob("*/*.json"))


def test_blessing_writes_every_example_and_what_must_agree(pytester, suite):
    result = suite(GATED, "--copa-bless")
    result.assert_outcomes(passed=1)
    file = "baselines/shout/p-on-scripted-shout-*.json"
    result.stdout.fnmatch_lines([f"accepted as baseline: {file} (score 1.000 on 30 test examples; the first one)"])
    (path,) = baselines(pytester)
    document = json.loads(path.read_text())
    assert len(document["examples"]) == 30
    assert set(document["fingerprints"]) == {"data", "split", "metric", "program", "lm"}
    assert document["versions"]["dspy"]


MUTE = """
import pytest

@pytest.mark.copa(strategy="none", min_score=0.0)
def test_it(copa_run):
    copa_run.check()

@pytest.mark.copa(strategy="p", min_score=0.0)
def test_searched(copa_run):
    copa_run.check()
"""


def test_a_run_in_which_no_answer_parses_is_an_error_and_never_a_baseline(pytester, suite, monkeypatch):
    monkeypatch.setenv("SCRIPT_MUMBLES", "1")
    result = suite(MUTE, "--copa-bless")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*ERROR*answers parse: none of 30 answers could be parsed*"])
    result.stdout.fnmatch_lines(["shout, none: not accepted as baseline, since none of 30 answers could be parsed*"])
    result.stdout.fnmatch_lines(["shout, p: not accepted as baseline*"])
    result.stdout.fnmatch_lines(["*runs: 2 error*"])
    assert not list(pytester.path.glob("baselines/**/*.json"))


def test_a_changed_split_is_not_comparable_and_says_so(suite, monkeypatch):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    monkeypatch.setenv("SCRIPT_N_TEST", "20")
    result = suite(GATED)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["not comparable*max_regression=0.05*", "runs: 1 pass, 1 not comparable*"])


def test_a_slice_that_fell_fails_and_the_table_names_the_worst(pytester, suite, monkeypatch):
    monkeypatch.setenv("SCRIPT_SLICES", "1")
    source = GATED.replace("0.05", "0.4")
    suite(source, "--copa-bless").assert_outcomes(passed=1)
    monkeypatch.setenv("SCRIPT_UNLUCKY", "j")
    result = suite(source, "--copa-cache-dir=other")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*FAIL*max_regression=0.4: Worse in 'j': -1.000*", "*worst slice*", "*j 0.000 (n 7)*"])
    (run,) = [one for one in latest(pytester)["runs"] if one["strategy"] == "p"]
    assert set(run["slices"].values()) == set("fghij")


def test_an_accepted_loss_moves_the_baseline_and_the_history_says_what_it_came_from(pytester, suite, monkeypatch):
    for unlucky in ("", "j"):
        monkeypatch.setenv("SCRIPT_UNLUCKY", unlucky)
        suite(GATED, "--copa-bless", f"--copa-cache-dir=cache{unlucky}")
    (anchor,) = (pytester.path / "baselines" / "history").glob("*/*.json")
    assert (read_baseline(anchor).score, read_baseline(*baselines(pytester)).score < 1) == (1.0, True)
    assert len(anchor.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_blessing_a_single_draw_warns_and_several_are_all_kept(pytester, suite, monkeypatch):
    monkeypatch.setenv("SCRIPT_WAVERS", "1")
    suite(GATED, "--copa-bless").stdout.fnmatch_lines(["*a baseline of a single draw*"])
    result = suite(GATED, "--copa-bless", "--copa-repeat=3")
    result.stdout.no_fnmatch_line("*a single draw*")
    baseline = read_baseline(*baselines(pytester))
    assert {len(draws) for draws in baseline.repeats.values()} == {3}
    assert 0 < baseline.noise < 1


def test_the_best_of_several_runs_is_no_baseline_but_any_other_is(pytester, suite, monkeypatch):
    for unlucky, cache in (("j", "one"), ("ij", "two"), ("", "three")):
        monkeypatch.setenv("SCRIPT_UNLUCKY", unlucky)
        suite(GATED, f"--copa-cache-dir={cache}").assert_outcomes(passed=1)
    result = suite(GATED, "--copa-bless", "--copa-cache-dir=three")
    result.stdout.fnmatch_lines(["*shout (p on scripted/shout): not accepted*the best of 3 runs*"])
    assert not baselines(pytester)
    suite(GATED, "--copa-bless", "--copa-cache-dir=one")
    assert read_baseline(*baselines(pytester)).score < 1


def test_workers_bless_through_the_controller(pytester, suite):
    pytester.makepyfile(test_suite=GATED)
    result = pytester.runpytest_subprocess(*STRICT, "-n", "2", "--copa-bless")
    result.assert_outcomes(passed=1)
    assert [path.name.startswith("p-on-scripted-shout") for path in baselines(pytester)] == [True]


def test_a_model_that_got_worse_fails_the_regression_gate(suite, monkeypatch):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    monkeypatch.setenv("SCRIPT_FORGETS", "1")
    result = suite(GATED)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*FAIL*max_regression=0.05*", "runs: 1 pass, 1 fail*"])


def test_blessing_says_what_it_does_to_the_accepted_results(suite, monkeypatch):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    result = suite(GATED, "--copa-bless")
    result.stdout.fnmatch_lines(["accepted as baseline: *.json (score 1.000 on 30 test examples; as before)"])
    monkeypatch.setenv("SCRIPT_FORGETS", "1")
    result = suite(GATED, "--copa-bless")
    result.stdout.fnmatch_lines(["*(score 0.*, was 1.000: 0 better, * worse; changed: *lm)"])


@pytest.mark.parametrize("damaged", ["", '{"schema": 1', "{}"], ids=["empty", "cut off", "of another kind"])
def test_a_damaged_baseline_stops_a_run_and_is_replaced_by_blessing(pytester, suite, damaged):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    (path,) = baselines(pytester)
    accepted = path.read_text()
    path.write_text(damaged)
    result = suite(GATED)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*{path.name}*Next: restore it (git checkout), or accept *--copa-bless*"])
    assert path.read_text() == damaged
    result = suite(GATED, "--copa-bless")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["accepted as baseline: *(score 1.000 *; in place of a file that could not be read)"])
    assert path.read_text() == accepted
    suite(GATED).assert_outcomes(passed=1)


def test_a_baseline_folder_can_be_chosen(pytester, suite):
    suite(GATED, "--copa-bless", "--copa-baseline-dir=kept/here").assert_outcomes(passed=1)
    assert len(list((pytester.path / "kept" / "here" / "shout").iterdir())) == 1


def test_better_than_compares_with_an_earlier_strategy_of_the_session(suite):
    result = suite(
        """
        import pytest

        @pytest.mark.copa(strategy="p", better_than="none")
        def test_gain(copa_run):
            copa_run.check()

        @pytest.mark.copa(strategy="p", better_than="P")
        def test_no_gain(copa_run):
            assert copa_run.verdict.value == "undecided"

        @pytest.mark.copa(strategy="p", better_than="gepa")
        def test_unknown(copa_run):
            assert copa_run.gates[-1].message.startswith("open until the session ends")
        """
    )
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["undecided*better_than=gepa: there is no result of 'gepa'*"])


def test_spending_gates_hold_what_the_optimization_cost_when_it_was_made(suite):
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", max_tokens=10)
        def test_tokens(copa_run):
            copa_run.check()

        @pytest.mark.copa(strategy="p", max_tokens=10_000_000, max_seconds=600, max_usd=1, max_cost_per_answer=0.1)
        def test_enough(copa_run):
            copa_run.check()
        """
    for _ in range(2):
        result = suite(source)
        result.assert_outcomes(passed=1, failed=1)
        result.stdout.fnmatch_lines(["*FAIL*max_tokens=10: *tokens, expected at most 10*"])


def test_gates_can_be_defaults_of_the_ini_file_which_a_marker_overrules(pytester, suite):
    pytester.makeini("[pytest]\ncopa_min_score = 0.9\ncopa_undecided_fails = true\n")
    result = suite(
        """
        import pytest

        @pytest.mark.copa(strategy="none")
        def test_default(copa_run):
            assert copa_run.undecided_fails
            copa_run.check()

        @pytest.mark.copa(strategy="none", min_score=0, undecided_fails=False)
        def test_overruled(copa_run):
            assert not copa_run.undecided_fails
            copa_run.check()
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*FAIL*min_score=0.9*"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "copa_min_score = 85",
            "ini option copa_min_score: got '85', expected a number from 0 to 1; write 0.85 for 85 %.",
        ),
        ("copa_undecided_fails = maybe", "ini option copa_undecided_fails: got 'maybe', expected True or False."),
        ("copa_max_calls = few", "ini option copa_max_calls: got 'few', expected a whole number, 0 or more."),
    ],
)
def test_a_wrong_default_is_a_usage_error_that_names_its_place(pytester, suite, line, message):
    pytester.makeini(f"[pytest]\n{line}\n")
    result = suite(GATED)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])


def test_check_takes_gates_of_its_own_and_the_report_has_them(pytester, suite):
    result = suite(
        """
        import pytest

        @pytest.mark.copa(strategy="none", min_score=0)
        def test_it(copa_run):
            copa_run.check(max_calls=400)
            copa_run.check(min_score=0.5)

        @pytest.mark.copa(strategy="none")
        def test_wrong(copa_run):
            copa_run.check(min_scor=0.5)
        """
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*FAIL*min_score=0.5*", "*copa_run.check(): unknown argument 'min_scor'*"])
    assert [run["verdict"] for run in latest(pytester)["runs"]] == ["fail", "pass"]


def test_test_examples_that_were_trained_on_are_refused_before_anything_is_spent(suite):
    source = """
        import dspy
        import pytest
        from conftest import WORDS, rows, shouted
        from copa_harness import Task

        @pytest.fixture
        def copa_task():
            seen = rows([f"{word.title()}!" for word in WORDS[:2]])
            return Task("leaky", dspy.Predict("question -> answer"), shouted, rows(WORDS[:12]), rows(WORDS[12:18]),
                        [*rows(WORDS[20:30]), *seen])

        @pytest.mark.copa(strategy="p", min_score=0.5)
        def test_gated(copa_run): pass

        @pytest.mark.copa(strategy="none")
        def test_ungated(copa_run):
            assert copa_run.verdict.value == "error"
        """
    result = suite(source)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*TaskError: task 'leaky': *2 of 12*seen*", "*no_leakage*"])


def test_demonstrations_in_the_prompt_count_as_seen_and_leave_the_score_unjudged(suite):
    source = """
        import dspy
        import pytest
        from conftest import WORDS, rows, shouted
        from copa_harness import Task

        @pytest.fixture
        def copa_task():
            program = dspy.Predict("question -> answer")
            program.demos = rows(WORDS[20:22])
            return Task("shown", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[20:40]))

        @pytest.mark.copa(strategy="none", min_score=0.5)
        def test_it(copa_run):
            assert [gate.gate for gate in copa_run.gates] == ["no_leakage", "max_error_rate=0"]
            copa_run.check()
        """
    result = suite(source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ERROR*no_leakage: 2 of 20 test examples*", "*demonstrations; first:*"])


def test_an_evaluation_can_stop_as_soon_as_its_gates_are_decided(pytester, suite):
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", min_score=0.5)
        def test_it(copa_run):
            assert copa_run.sequential.n_used < 30
            copa_run.check(max_calls=400)

        @pytest.mark.copa(strategy="p", min_score=0.5)
        def test_too_late(copa_run):
            with pytest.raises(Exception, match="expected gates on scores in the marker"):
                copa_run.check(min_score=0.6)
        """
    result = suite(source, "--copa-sequential", "--copa-threads=4", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["copa: *stopping early*", "saved by stopping early:"])
    run = latest(pytester)["runs"][1]
    assert run["n"] == run["sequential"]["n_used"] < 30


def test_a_plan_says_what_the_rows_can_decide(suite):
    result = suite(GATED, "--copa-plan")
    result.stdout.fnmatch_lines(["*shout, max_regression=0.05 on 30 rows: if 10 %*", "*80 % take 264 rows*"])


def test_in_sequential_mode_a_regression_gate_reads_its_baseline(suite, monkeypatch):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    monkeypatch.setenv("SCRIPT_FORGETS", "1")
    result = suite(GATED, "--copa-sequential", "--copa-threads=2")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*FAIL*max_regression=0.05: a drop is shown*"])


def test_in_sequential_mode_a_gate_on_repeats_says_what_it_needs_and_is_not_dropped(suite, pytester):
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", min_score=0.5, min_pass_all=0.9)
        def test_it(copa_run):
            copa_run.check()
        """
    suite(source, "--copa-sequential", "--copa-threads=4").assert_outcomes(passed=1)
    (gate,) = [one for one in latest(pytester)["runs"][-1]["gates"] if one["gate"] == "min_pass_all=0.9"]
    assert gate["verdict"] == "undecided"
    assert "--copa-repeat=3" in gate["message"]


@pytest.mark.parametrize("other", ["--copa-bless", "--copa-repeat=2"])
def test_stopping_early_goes_with_nothing_that_needs_all_examples(suite, other):
    result = suite(GATED, "--copa-sequential", other)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    name = other.split("=")[0]
    result.stderr.fnmatch_lines([f"ERROR: --copa-sequential stops before*{name}*expected one of the two."])


def test_repeats_are_independent_answers_kept_in_the_cache(pytester, suite, monkeypatch):
    monkeypatch.setenv("SCRIPT_WAVERS", "1")
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", min_pass_all=0.9)
        def test_it(copa_run):
            assert 0.5 < copa_run.score < 1
            assert len(copa_run.repeats) == 30 and {len(scores) for scores in copa_run.repeats.values()} == {3}
            copa_run.check()
        """
    result = suite(source, "--copa-repeat=3")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*FAIL*min_pass_all=0.9*", "*passed all 3 repeats*"])
    first = latest(pytester)
    suite(source, "--copa-repeat=3")
    second = latest(pytester)
    assert sum(run["usage"]["paid_calls"] for run in second["runs"]) == 0
    assert second["runs"][1]["repeats"] == first["runs"][1]["repeats"]


FAMILY = """
import pytest

@pytest.mark.copa(strategy="p", max_regression=0.05)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it(copa_run, seed):
    assert FAMILY in (None, copa_run.gates[-1].details.get("family", 3))
    copa_run.check()
"""


def test_a_gate_is_one_of_its_suite_also_when_it_runs_alone(pytester, suite, monkeypatch):
    suite(FAMILY.replace("FAMILY", "None"), "--copa-bless").assert_outcomes(passed=3)
    (path,) = baselines(pytester)
    assert json.loads(path.read_text())["families"]["max_regression"] == 3
    monkeypatch.setenv("SCRIPT_FORGETS", "1")
    for more in ((), ("-k", "1"), ("test_suite.py::test_it[1]",)):
        result = suite(FAMILY.replace("FAMILY", "3"), *more)
        result.stdout.fnmatch_lines(["*one of 3 regression gates of this suite*"])


def test_a_missing_baseline_fails_in_ci_unless_it_may_pass(suite, monkeypatch):
    suite(GATED).assert_outcomes(passed=1)
    monkeypatch.setenv("CI", "true")
    result = suite(GATED)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*there is no baseline to compare with yet*"])
    suite(GATED, "--copa-missing-baseline=pass").assert_outcomes(passed=1)
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    result = suite(GATED)
    result.assert_outcomes(passed=1)


RIVALS = """
import pytest

@pytest.mark.copa(strategy="none", better_than="p")
def test_needs_a_later_run(copa_run):
    copa_run.check()

@pytest.mark.copa(strategy="p")
def test_rival(copa_run):
    assert copa_run.score == 1

@pytest.mark.copa(strategy="none", better_than="p", undecided_fails=True)
def test_comes_after(copa_run):
    copa_run.check()

@pytest.mark.copa(strategy="p", better_than="none")
def test_gain(copa_run):
    copa_run.check()

@pytest.mark.copa(strategy="p", better_than="w")
def test_nothing_to_compare_with(copa_run):
    copa_run.check()
"""


def test_better_than_has_the_same_answer_however_many_workers_there_are(pytester, suite):
    def gates():
        runs = latest(pytester)["runs"]
        kept = ("verdict", "message", "details")
        return {
            run["test"]: [{name: gate[name] for name in kept} for gate in run["gates"] if "better" in gate["gate"]]
            for run in runs
            if run["gates"]
        }

    alone = suite(RIVALS)
    alone.assert_outcomes(passed=4, failed=1)
    alone.stdout.fnmatch_lines(["*test_needs_a_later_run: better_than=p is judged now*fail.*"])
    assert alone.ret == 1
    serial = gates()
    assert [gate["verdict"] for found in serial.values() for gate in found] == ["fail", "fail", "pass", "undecided"]
    shared = pytester.runpytest_subprocess(*STRICT, "-n", "2")
    assert shared.ret == 1
    assert gates() == serial


def test_a_comparison_left_open_fails_the_session_when_undecided_does(suite):
    result = suite(
        """
        import pytest

        @pytest.mark.copa(strategy="p", better_than="w", undecided_fails=True)
        def test_it(copa_run):
            copa_run.check()
        """
    )
    result.assert_outcomes(passed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["exit status 1: *better_than=w is judged now*undecided. there is no result of 'w'*"])


def test_comparisons_that_only_check_asks_for_are_counted_before_anything_runs(suite):
    suite(GATED, "--copa-bless").assert_outcomes(passed=1)
    result = suite(
        """
        import pytest

        def helper(run):
            run.check(max_regression=0.1)

        @pytest.mark.copa(strategy="p", max_regression=0.05)
        def test_marked(copa_run):
            copa_run.check(max_regression=0.2)

        @pytest.mark.copa(strategy="p")
        def test_asked(copa_run):
            copa_run.check(max_regression=0.05, better_than="none")
            assert copa_run.gates[-1].details["family"] == 2

        @pytest.mark.copa(strategy="p", better_than="p")
        def test_hidden(copa_run):
            helper(copa_run)
            assert copa_run.gates[-1].details["family"] == 2
        """
    )
    result.assert_outcomes(passed=3)
